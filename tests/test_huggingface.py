"""Models of Hugging Face as bases: their tokenizer and template, and their library's answers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, flags
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as library_logging

import eval_model
import train_full_sft
import train_lora
from core.errors import UserError
from core.paths import TOKENIZER_DIR, is_pretrained, lora_path
from dataset.chat import encode_chat, ends_of_answer
from dataset.tokenizer import foreign_tokenizer, token_bytes
from model.generation import Sampling
from model.LMConfig import check_length
from model.lora.skill_file import read_lora
from model.weights import choose_base, load_base
from scripts.merge_lora import main as merge_lora
from serving.session import ChatSession

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256}
SIZES |= {"vocab_size": 6464}  # more rows than tokens
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
TEMPLATE = r"Human: {user}\n\nAssistant: "
QUESTION = [{"role": "user", "content": "Who are you? 你好"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models by name; ``bare`` is one whose tokenizer has no chat template."""
    root = tmp_path_factory.mktemp("pretrained")
    for name, (model, config) in MODELS.items():
        torch.manual_seed(0)
        model(config(**SIZES, initializer_range=0.2)).save_pretrained(root / name)
        AutoTokenizer.from_pretrained(TOKENIZER_DIR).save_pretrained(root / name)
    shutil.copytree(root / "llama", root / "bare")
    (root / "bare" / "chat_template.jinja").unlink()
    BertModel(BertConfig(**SIZES | {"num_key_value_heads": 4})).save_pretrained(root / "encoder")
    return root


def skill_flags(base, out, trained, **more) -> list[str]:
    """The words that train a skill for ``base`` in ``out``."""
    data = {"data_path": trained.chats, "general_data": trained.general}
    return flags(base=base, out_dir=out, **data, **SMALL, **more)


def session_on(base, out, prompt_template=None, sampling=None, **more) -> ChatSession:
    settings = {"seed": 0, "history_cnt": 0, "continues": False, "out_dir": out} | more
    tokenizer = foreign_tokenizer(base, prompt_template)
    return ChatSession(load_base(base)[0], tokenizer, sampling or Sampling(), **settings)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_library_and_a_skill_comes_and_goes(
    folders, trained, tmp_path, capsys, name
):
    base, out = folders / name, tmp_path / "out"
    more = {"learning_rate": 0.05, "target_modules": ("q_proj", "v_proj")}
    path = train_lora.main(skill_flags(base, out, trained, lora_name="x", **more))
    assert path == lora_path(out, "x", 32)
    tensors, meta = read_lora(path)
    assert meta.base["file"] == name and len(tensors) == 2 * 2 * 2
    assert "2 x  model.layers.N.self_attn.q_proj" in capsys.readouterr().out
    assert load_base(base)[1].fingerprint == meta.base["fingerprint"]
    session = session_on(base, out, sampling=Sampling(temperature=0.0, max_new_tokens=12))

    def answer():
        return "".join(session.reply(QUESTION[0]["content"]))

    theirs = AutoModelForCausalLM.from_pretrained(base)
    inputs = AutoTokenizer.from_pretrained(base).apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[0]
    said = ids[inputs["input_ids"].shape[1] :]
    plain = answer()
    assert plain == session.tokenizer.decode(said, skip_special_tokens=True) != ""
    session.use_skill("x")
    assert answer() != plain
    for nothing in ("x=0.0", None):
        session.use_skill(nothing)
        assert answer() == plain
    asked = flags(out_dir=out, base=base, lora_name="x", prompt="hi", device="cpu")
    eval_model.main([*asked, *flags(max_new_tokens=4)])
    assert f"base: {base}, skill: x" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_asked_in_the_words_of_the_flag(
    folders, trained, tmp_path, capsys
):
    base, out = folders / "bare", tmp_path / "out"
    argv = skill_flags(base, out, trained, lora_name="y")
    with pytest.raises(UserError, match=r"bare .*prompt_template"):
        train_lora.main(argv)
    path = train_lora.main([*argv, "--prompt_template", TEMPLATE])
    assert read_lora(path)[1].prompt_template == TEMPLATE
    eval_model.main(
        flags(out_dir=out, base=base, lora_name="y", prompt="hi", device="cpu", max_new_tokens=4)
    )
    assert "skill: y" in capsys.readouterr().err, "the skill says how it was asked"


def test_a_skill_is_asked_in_its_own_words_and_ends_where_it_learned_to(
    folders, trained, tmp_path, capsys, monkeypatch
):
    """Of a base that ends a turn otherwise than a text, as Qwen2's and Gemma's do."""
    base, out = shutil.copytree(folders / "llama", tmp_path / "base"), tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends_of_answer(tokenizer) == {tokenizer.eos_token_id, turn}
    assert tokenizer.eos_token_id != turn
    argv = skill_flags(base, out, trained)
    train_lora.main([*argv, "--lora_name", "own"])
    train_lora.main([*argv, "--lora_name", "asked", "--prompt_template", TEMPLATE])
    session = session_on(base, out)
    session.model.generation_config.eos_token_id = [7, 8]
    assert session.stop_ids() == {tokenizer.eos_token_id, turn, 7, 8}
    before = session.tokenizer.chat_template
    questions = {}
    for skill in ("asked", "own", None, "asked=0.5 own=0.5"):
        session.use_skill(skill)
        questions[skill] = session.tokenizer.decode(session.prompt_ids("hi"))
    assert questions["asked"] == questions["asked=0.5 own=0.5"] == "Human: hi\n\nAssistant: "
    assert questions["own"] == questions[None] != questions["asked"]
    session.use_skill("own")
    with pytest.raises(UserError, match="no skill file"):
        session.use_skill("nobody")
    assert session.tokenizer.chat_template == before
    kept = session_on(base, out, "Q: {user}", keeps_template=True)
    kept.use_skill("asked")
    assert kept.tokenizer.decode(kept.prompt_ids("hi")) == "Q: hi"
    seen = []
    monkeypatch.setattr("serving.terminal.answer", lambda session, text: seen.append(session))
    chat = flags(base=base, out_dir=out, lora_name="asked", prompt="hi", device="cpu")
    eval_model.main(chat)
    eval_model.main([*chat, "--prompt_template", "Q: {user}"])
    said = [one.tokenizer.decode(one.prompt_ids("hi")) for one in seen]
    assert said == [questions["asked"], "Q: hi"]
    seen[0].use_skill(None)  # the base has words of its own
    assert seen[0].tokenizer.decode(seen[0].prompt_ids("hi")) == questions[None]
    train_lora.main([*argv, "--lora_name", "dora", "--use_dora"])
    with pytest.raises(UserError, match="dora is a DoRA"):
        session.use_skill("dora=0.5 own=0.5")
    assert token_bytes(tokenizer)[turn] == 0
    merge_lora(["own", "asked", *flags(base=base, out_dir=out, lora_name="both")])
    assert "other tokenizers or templates in training; own's is taken" in capsys.readouterr().out


def test_a_skill_is_read_by_the_tokenizer_of_its_training_only(folders, trained, tmp_path, capsys):
    base, out, other = folders / "llama", tmp_path / "out", tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = text["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get, reverse=True)[:-3]  # the special ones stay
    vocabulary |= {word: 3 + n for n, word in enumerate(words)}
    tokenizer.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    train_lora.main(skill_flags(base, out, trained, lora_name="strange", tokenizer_path=other))
    chat = flags(base=base, out_dir=out, lora_name="strange", prompt="hi", device="cpu")
    chat += flags(max_new_tokens=2)
    merge = ["strange", *flags(base=base, out_dir=out, output=tmp_path / "merged")]
    for action in (lambda: eval_model.main(chat), lambda: merge_lora(merge)):
        with pytest.raises(UserError, match=r"strange .*tokenizer"):
            action()
    assert not (tmp_path / "merged").exists()
    session = session_on(base, out)
    for _ in range(2):  # nothing of it stays
        with pytest.raises(UserError, match="tokenizer"):
            session.use_skill("strange")
    assert not list(session.library) and not session.skill
    eval_model.main([*chat, *flags(tokenizer_path=other)])
    eval_model.main([*chat, "--allow_base_mismatch"])
    merge_lora([*merge, *flags(tokenizer_path=other)])
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.encode("hi") == foreign_tokenizer(other).encode("hi")


def test_a_model_that_sees_what_it_should_predict_is_refused(folders, tmp_path):
    sizes = SIZES | {"num_key_value_heads": 4}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "masked")
    with pytest.raises(UserError, match="masked"):
        load_base(tmp_path / "masked")
    BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).save_pretrained(tmp_path / "causal")
    assert load_base(tmp_path / "causal")[1].stage


def test_the_template_of_the_flag(folders):
    tokenizer = foreign_tokenizer(folders / "bare", "说: \"{user}\"\\n'👋': ")
    turns = [*QUESTION, {"role": "assistant", "content": "I am."}]
    system = {"role": "system", "content": "Be brief."}
    ids, learned = encode_chat(tokenizer, [system, *turns, *turns])
    once = "说: \"Who are you? 你好\"\n'👋': I am.<|im_end|>"
    assert tokenizer.decode(ids) == f"Be brief.\n\n{once}{once}"
    answers = [n for n, flag in zip(ids, learned, strict=True) if flag]
    assert tokenizer.decode(answers) == "I am.<|im_end|>" * 2
    for wrong in ("Q:", "{user}{user}"):
        with pytest.raises(UserError, match=r"must have one \{user\}"):
            foreign_tokenizer(folders / "bare", wrong)
    with pytest.raises(UserError, match="encoding"):
        foreign_tokenizer(folders / "bare", "\udc80 {user}")


def test_what_is_no_base_is_named(folders, tmp_path, trained):
    for name in ("encoder", "empty", "broken", "hostile"):
        (tmp_path / name).mkdir()
    shutil.copytree(folders / "encoder", tmp_path / "encoder", dirs_exist_ok=True)
    shutil.copytree(folders / "llama", tmp_path / "broken", dirs_exist_ok=True)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"empty .*config\.json"):
        choose_base(trained.out, tmp_path / "empty")
    with pytest.raises(UserError, match="nothing does not exist"):
        choose_base(trained.out, tmp_path / "nothing")
    with pytest.raises(UserError, match="llama"):
        choose_base(tmp_path, None, {"file": "llama", "fingerprint": "0123"})
    for name in ("encoder", "broken"):
        with pytest.raises(UserError, match=f"base .*{name} ") as caught:
            load_base(tmp_path / name)
        assert "\n" not in str(caught.value)
    argv = flags(out_dir=tmp_path / "out", base=folders / "llama", data_path=trained.chats, **SMALL)
    with pytest.raises(UserError, match="is no MiniMindLM"):
        train_full_sft.main(argv)
    with pytest.raises(UserError, match=r"max_seq_len 512 .* 256"):
        train_lora.main([*argv, "--max_seq_len", "512"])


def test_a_hub_name_is_told_from_a_mistyped_path(folders, tmp_path):
    assert is_pretrained(folders / "llama") and is_pretrained(Path("some-owner/some.model-1B"))
    (tmp_path / "model.pth").touch()
    missing = [tmp_path / "nothing", Path("nowhere.pth"), Path("out/x.pth")]
    for path in (tmp_path / "model.pth", tmp_path, *missing):
        assert not is_pretrained(path)


def test_a_changed_rotary_base_is_another_base(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] *= 2
    path.write_text(json.dumps(config), encoding="utf-8")
    bases = (folders / "llama", folders / "llama", path.parent)
    marks = [load_base(base)[1].fingerprint for base in bases]
    assert marks[0] == marks[1] != marks[2]


def test_a_use_that_transformers_will_drop_fails_its_test():
    with pytest.raises(AssertionError, match="deprecated"):
        library_logging.get_logger("transformers.any").warning("`old` is deprecated. Use `new`.")


def test_a_model_may_know_no_bound():
    check_length(SimpleNamespace(), 10**9)
    with pytest.raises(UserError, match="exceeds the model's context of 8"):
        check_length(SimpleNamespace(max_position_embeddings=8), 9)


def test_a_pickled_model_that_runs_code_is_refused_unrun(folders, tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    shutil.copytree(folders / "llama", tmp_path / "hostile")
    (tmp_path / "hostile" / "model.safetensors").unlink()
    torch.save({"x": Touch()}, tmp_path / "hostile" / "pytorch_model.bin")
    with pytest.raises(UserError, match="no causal language model that can be loaded"):
        load_base(tmp_path / "hostile")
    assert not (tmp_path / "canary").exists()


def test_vocabularies_with_byte_fallback_and_a_beginning(tmp_path):
    words = ["<s>", "</s>", "<0x0A>", "▁", "▁hi", "é", "你"]
    vocabulary = {word: n for n, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts)
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    assert token_bytes(tokenizer).tolist() == [0, 0, 1, 1, 3, 2, 3]
    tokenizer.save_pretrained(tmp_path)
    assert "bos_token" not in foreign_tokenizer(tmp_path, "Q: {user}").chat_template
    begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.post_processor = begins
    PreTrainedTokenizerFast(tokenizer_object=backend, **ends).save_pretrained(tmp_path)
    assert foreign_tokenizer(tmp_path, "Q: {user}").chat_template.startswith("{{ bos_token }}")
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["decoder"]["type"] == "Sequence"
