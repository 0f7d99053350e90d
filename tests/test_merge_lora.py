"""Fusing skills by the command: what it writes computes what the attached skills do, and nothing is
overwritten.
"""

import re
import shutil

import pytest
import torch
from conftest import flags, logits_of, strengthen
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eval_model
from core.errors import UserError
from core.files import sha256_file
from core.paths import TOKENIZER_DIR
from dataset.tokenizer import load_tokenizer, tokenizer_fingerprint, use_template
from model.lora.library import SkillLibrary
from model.lora.skill_file import SkillMeta, read_lora
from model.model_lora import apply_lora, attach_lora, remove_lora, save_lora
from model.weights import load_base
from scripts.merge_lora import main

TEMPLATE = "Q: {user}"


@pytest.fixture
def out(trained, tmp_path):
    """A copy of the trained chat base and its two skills, which matter more than four steps make
    them.
    """
    folder = tmp_path / "out"
    (folder / "lora").mkdir(parents=True)
    for name in ("full_sft_64.pth", "full_sft_64.json"):
        shutil.copyfile(trained.out / name, folder / name)
    model, _ = load_base(folder / "full_sft_64.pth")
    write_skills(model, folder, ("a", "b"), 64)
    return folder


def write_skills(model, folder, names, dim, tokenizer="0123"):
    """Skills of other ranks and targets for a bare ``model``, which stays so."""
    for seed, name in enumerate(names):
        apply_lora(model, 4 + 2 * seed, 3.0, "all-linear" if seed else "square")
        strengthen(model, seed)
        base = {"file": f"full_sft_{dim}.pth"}
        meta = SkillMeta(base=base, tokenizer=tokenizer, prompt_template=TEMPLATE)
        save_lora(model, folder / "lora" / f"lora_{name}_{dim}.pth", meta)
        remove_lora(model)


def mixed(out, **weights):
    model, _ = load_base(out / "full_sft_64.pth")
    library = SkillLibrary(model)
    for name in weights:
        library.add(name, out / "lora" / f"lora_{name}_64.pth")
    library.use(weights)
    return model


@pytest.mark.parametrize(
    ("words", "weights"), [(["a"], {"a": 1.0}), (["a=0.7", "b=-0.3"], {"a": 0.7, "b": -0.3})]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_a_merged_base_computes_what_the_skills_did(out, capsys, words, weights, dtype, tolerance):
    before = {path: sha256_file(path) for path in out.rglob("*.pth")}
    output = out / "new" / "full_sft_medic_64.pth"
    assert main([*words, *flags(out_dir=out, output=output, dtype=dtype)]) == output
    printed = capsys.readouterr().out
    drift = float(re.search(r"logits differ by at most (\S+) from", printed)[1])
    assert drift <= tolerance and (drift > 1e-4) == (dtype == "bfloat16")
    model, record = load_base(output)
    expected = logits_of(mixed(out, **weights))
    torch.testing.assert_close(logits_of(model), expected, atol=tolerance, rtol=0)
    assert (
        expected - logits_of(load_base(out / "full_sft_64.pth")[0])
    ).abs().max() > 10 * tolerance
    assert record.stage == "full_sft" and record.more["merged"]["skills"] == weights
    assert record.metrics == {}, "those were of the base without the skills"
    assert before == {path: sha256_file(path) for path in before}
    eval_model.main(flags(out_dir=out, base=output, prompt="hi", device="cpu", max_new_tokens=3))
    with pytest.raises(UserError, match="full_sft_medic_64"):
        main([*words, *flags(out_dir=out, output=output)])


def test_a_record_of_something_else_beside_the_output_stays(out):
    (out / "data.json").write_text("mine")
    with pytest.raises(UserError, match=r"data\.json exists"):
        main(["a", *flags(out_dir=out, output=out / "data.pth")])
    assert (out / "data.json").read_text() == "mine" and not (out / "data.pth").exists()


@pytest.mark.parametrize("rank", [0, 3])
def test_a_fused_skill_is_the_exact_sum_or_says_what_it_lost(out, capsys, rank):
    path = main(["a=0.7", "b=-0.3", *flags(out_dir=out, lora_name="both", rank=rank)])
    printed = capsys.readouterr().out
    lost = float(re.search(r"([\d.]+) % of the update is lost", printed)[1])
    _, meta = read_lora(path)
    assert set(meta.ranks.values()) == ({3} if rank else {6, 10})
    assert meta.prompt_template == TEMPLATE and meta.tokenizer == "0123"
    assert meta.more["fused"] == {"a": 0.7, "b": -0.3} and meta.base["file"] == "full_sft_64.pth"
    model, _ = load_base(out / "full_sft_64.pth")
    attach_lora(model, path)
    difference = (logits_of(model) - logits_of(mixed(out, a=0.7, b=-0.3))).abs().max()
    assert (difference <= 1e-5) == (rank == 0) and (lost > 1) == (rank == 3)
    with pytest.raises(UserError, match=r"lora_both_64\.pth exists"):
        main(["a", *flags(out_dir=out, lora_name="both")])


def test_a_skill_minus_itself_is_the_base(out):
    path = main(["a", "b", *flags(out_dir=out, lora_name="both")])
    model, _ = load_base(out / "full_sft_64.pth")
    base = logits_of(model)
    library = SkillLibrary(model)
    for name in ("both", "a", "b"):
        library.add(name, out / "lora" / f"lora_{name}_64.pth")
    library.use({"both": 1.0, "a": -1.0, "b": -1.0})
    torch.testing.assert_close(logits_of(model), base, atol=1e-5, rtol=0)
    assert path.name == "lora_both_64.pth"


def test_a_hugging_face_base_is_merged_into_a_folder_that_its_library_loads(out, tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64, vocab_size=6400)).eval()
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(TOKENIZER_DIR).save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    use_template(tokenizer, TEMPLATE)
    write_skills(model, out, ("llama",), 32, tokenizer_fingerprint(tokenizer))
    attach_lora(model, out / "lora" / "lora_llama_32.pth")
    for name in (".merged.unfinished", "merged.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "added_tokens.json").write_bytes(b"{}")
    argv = ["llama", *flags(out_dir=out, base=tmp_path / "base")]
    for output, said in (
        ("x.pth", "must be a folder"),
        ("base/config.json/x", "cannot write .*config.json/x: "),
    ):
        with pytest.raises(UserError, match=said):
            main([*argv, *flags(output=tmp_path / output)])
    folder = main([*argv, *flags(output=tmp_path / "merged")])
    assert not (folder / "added_tokens.json").exists(), "nothing is left of a merge that was killed"
    assert (tmp_path / "merged.part" / "added_tokens.json").exists(), "which is no folder of ours"
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(merged.eval()), logits_of(model), atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert merged.config.use_cache and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("a", "choose --output (a base) or --lora_name (a skill)"),
        ("a --output x.pth --lora_name c", "choose --output (a base) or --lora_name (a skill)"),
        ("a=x --lora_name c", "'a=x' is no skill's weight: write NAME or NAME=0.5"),
        ("a=0.5 lora_a --lora_name c", "skill a is named twice; give it one weight"),
        ("a=nan --lora_name c", "a skill's weight must be a number, not nan"),
        ("a --output x.pth --rank 2", "--rank cuts a skill"),
        (
            "a --lora_name c --dtype bfloat16",
            "--dtype, --load_in_4bit and --tokenizer_path are for --output",
        ),
        (
            "a --lora_name c --load_in_4bit",
            "--dtype, --load_in_4bit and --tokenizer_path are for --output",
        ),
        (
            "a --lora_name c --tokenizer_path x",
            "--dtype, --load_in_4bit and --tokenizer_path are for --output",
        ),
        ("a --output x.pth --tokenizer_path x", "--tokenizer_path is for Hugging Face bases, and"),
        ("a --lora_name c --rank -1", "rank=-1 must be at least 0"),
        ("a=1e300 --lora_name c", "the weights 1e+300 are too large for layers.0.attention.wq"),
        ("nobody --lora_name c", "skills here: a, b"),
        ("a --output x", "--output x must end in .pth"),
        ("../a --lora_name c", "is not a skill name"),
        ("--lora_name c", "the following arguments are required: skills"),
    ],
)
def test_mistakes_are_one_sentence(out, argv, said):
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match=re.escape(said)):
        main([*argv.split(), "--out_dir", str(out)])
    assert sorted(out.rglob("*")) == before
