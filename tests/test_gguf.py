"""Bases and skills as GGUF files, judged by llama.cpp itself."""

import contextlib
import json
import random
import re
import shutil
import sys

import pytest
import torch
from conftest import flags, strengthen
from tokenizers import Tokenizer, processors
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.llama_cpp import apart, llama_cpp
from benchmarks.seeded_model import seeded_model
from core.errors import UserError, run
from core.paths import TOKENIZER_DIR
from dataset.tokenizer import load_tokenizer, tokenizer_fingerprint
from interop import gguf, ollama
from interop.llama import to_halves
from model.generation import Sampling, generate
from model.lora.library import SkillLibrary
from model.lora.skill_file import SkillMeta, save_lora
from model.model_lora import apply_lora, remove_lora
from model.weights import RunRecord, load_base, save_base
from scripts import convert_model

pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 6400}
SHAPE |= {"max_seq_len": 256, "norm_eps": 1e-4, "rope_theta": 5e3}  # no reader's defaults
SKILLS = {
    "square": {"rank": 3, "alpha": 12.0},
    "all": {"rank": 4, "target_modules": "all-linear", "rank_pattern": {"wq": 2}},
    "pissa": {"rank": 2, "target_modules": ("wk", "wo"), "init_lora_weights": "pissa"},
    "dora": {"rank": 2, "use_dora": True},
}
PLAIN = [name for name in SKILLS if name != "dora"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A base with sharp attention, and skills that change much."""
    folder = tmp_path_factory.mktemp("gguf") / "out"
    (folder / "lora").mkdir(parents=True)
    model, _ = seeded_model(SHAPE)
    known = tokenizer_fingerprint(load_tokenizer(TOKENIZER_DIR))
    save_base(folder / "full_sft_64.pth", model, RunRecord(stage="full_sft", tokenizer=known))
    for seed, (name, options) in enumerate(SKILLS.items()):
        apply_lora(model, **options)
        strengthen(model, seed)
        save_lora(model, folder / "lora" / f"lora_{name}_64.pth", SkillMeta(stage="lora"))
        remove_lora(model)
    return folder


def convert(out, output, **more):
    """What the door writes, with its Modelfile; float32 by default."""
    return convert_model.main(flags(to="gguf", out_dir=out, output=output, **more))


@pytest.fixture(scope="module")
def base(out, tmp_path_factory):
    return convert(out, tmp_path_factory.mktemp("base") / "full_sft_64.gguf")


@pytest.fixture(scope="module")
def ask(base):
    with llama_cpp(base) as ask:
        yield ask


def said(ask, model, ids, **fields):
    """What both say after ``ids``, greedily."""
    fields |= {"n_predict": 24, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    theirs = ask("/completion", prompt=ids, **fields)["tokens"]
    sampling = Sampling(temperature=0, max_new_tokens=24)
    return theirs, list(generate(model, ids, sampling, set(), torch.Generator()))


def skilled(out, **weights):
    model, _ = load_base(out / "full_sft_64.pth")
    library = SkillLibrary(model)
    for name in weights:
        library.add(name, out / "lora" / f"lora_{name}_64.pth")
    library.use(weights)
    return model


def test_llama_cpp_computes_and_says_what_a_base_does(out, ask):
    model = skilled(out)
    assert apart(ask, model) < 2e-3
    for prompt in ([1], [1, 500, 600, 700], list(range(3, 40))):
        theirs, ours = said(ask, model, prompt)
        assert theirs == ours and len(ours) == 24


@pytest.mark.parametrize("name", PLAIN)
def test_llama_cpp_computes_what_a_skill_does_at_any_weight(out, base, tmp_path, name):
    adapter = convert(out, tmp_path / f"{name}.gguf", lora_name=name)
    with llama_cpp(base, adapter) as ask:
        assert apart(ask, skilled(out)) > 0.1
        for weight in (1.0, 0.5, 0.0):
            model, field = skilled(out, **{name: weight}), [{"id": 0, "scale": weight}]
            assert apart(ask, model, lora=field) < 2e-3
        theirs, ours = said(ask, skilled(out, **{name: 1.0}), [1, 500, 600])
        assert theirs == ours


def test_merged_skills_need_no_adapter(out, tmp_path):
    path = convert(out, tmp_path / "x.gguf", skill=("square=0.7", "all"))
    with llama_cpp(path) as ask:
        assert apart(ask, skilled(out, square=0.7, all=1.0)) < 2e-3
    path = convert(out, tmp_path / "dora.gguf", skill="dora")
    with llama_cpp(path) as ask:
        assert apart(ask, skilled(out, dora=1.0)) < 2e-3


@pytest.mark.parametrize(
    ("dtype", "allowed"), [("float16", 0.01), ("bfloat16", 0.05), ("q8_0", 0.15), ("q4_0", 0.15)]
)
def test_llama_cpp_computes_nearly_the_same_with_rounded_weights(out, tmp_path, dtype, allowed):
    path = convert(out, tmp_path / "x.gguf", dtype=dtype)
    model = gguf.read_base(path)
    assert model.norm.weight.equal(skilled(out).norm.weight)  # norms stay as they are
    with llama_cpp(path) as ask:  # it rounds what goes into products, too
        assert apart(ask, model) < allowed


PARTS = (
    "hello",
    "World",
    "don't",
    "I'LL",
    "'s",
    "naïve",
    "e\u0301",
    "العربية",
    "हिन्दी",
    "한국어",
    "ภาษา",
)
PARTS += (
    "你好",
    "，世界。",
    "肺炎患者",
    "——",
    "“引号”",
    "２０２４",
    "Ⅷ",
    "½",
    "\u0663",
    "12345",
    "3.14",
    "0",
)
PARTS += (
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\u3000",
    "\u00a0",
    "\u200b",
    "\ufeff",
    "\u2028",
)
PARTS += (
    "😀",
    "👨\u200d👩\u200d👧",
    "🇨🇳",
    "𝒳",
    "ʰ",
    "_",
    "#",
    "//",
    "...",
    "$x^2$",
    "{{",
    "}}",
    "a",
    "B",
)
PARTS += ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "|>", "<s>")


def test_llama_cpp_reads_every_text_alike(ask, tokenizer):
    rng = random.Random(0)
    texts = ["".join(rng.choices(PARTS, k=rng.randint(1, 9))) for _ in range(400)]
    for text in [*texts, *PARTS, " a", "a ", "\n a", "a\n \n", "a  b"]:
        for special in (True, False):
            theirs = ask("/tokenize", content=text, parse_special=special)["tokens"]
            assert theirs == tokenizer(text, split_special_tokens=not special).input_ids, text
            with_ends = ask("/tokenize", content=text, parse_special=special, add_special=True)
            assert with_ends["tokens"] == theirs


CHATS = ("u", "su", "uau", "suau")


def turns(roles):
    names, words = {"s": "system", "u": "user", "a": "assistant"}, [" Hi 你好\n", "{{ x }} ", "…"]
    return [{"role": names[x], "content": words[n % 3] + x} for n, x in enumerate(roles)]


@pytest.mark.parametrize("roles", CHATS)
def test_llama_cpp_writes_chats_alike(ask, tokenizer, roles):
    theirs = ask("/apply-template", messages=turns(roles))["prompt"]
    assert theirs == tokenizer.apply_chat_template(
        turns(roles), tokenize=False, add_generation_prompt=True
    )


def go(template, messages):
    """What the few parts of Go's templates that a Modelfile has here write."""
    begin = re.match(r"{{ if not \.System }}(.*?){{ end }}", template, re.DOTALL)
    written = begin[1] if begin and messages[0]["role"] != "system" else ""
    loop = r"{{ range \.Messages }}(.*){{ end }}(.*)"
    body, end = re.fullmatch(loop, template[begin.end() if begin else 0 :], re.DOTALL).groups()
    choice = (
        r'{{ if eq \.Role "system" }}(.*){{ else if eq \.Role "user" }}(.*){{ else }}(.*){{ end }}'
    )
    chosen = re.fullmatch(choice, body, re.DOTALL)
    for turn in messages:
        text = body
        if chosen:
            text = chosen[1 + ("system", "user", "assistant").index(turn["role"])]
        parts = re.split(r"{{ \.(Role|Content) }}", text)
        written += "".join(turn[x.lower()] if n % 2 else x for n, x in enumerate(parts))
    return written + end


# MiniMind's of April 2025: a system message of its own, and the prompt as the end of a question.
MINIMIND = (
    "{% if messages[0].role == 'system' %}{{ '<s>system\n' + messages[0].content + '</s>\n' }}"
    "{% else %}{{ '<s>system\n你是 MiniMind。</s>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<s>user\n' + m.content + '</s>\n<s>assistant\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '</s>\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("jinja", [None, MINIMIND], ids=["own", "minimind"])
@pytest.mark.parametrize("roles", CHATS)
def test_a_modelfile_writes_chats_alike(jinja, roles):
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    tokenizer.chat_template = jinja or tokenizer.chat_template
    template = ollama.go_template(tokenizer)
    wanted = tokenizer.apply_chat_template(turns(roles), tokenize=False, add_generation_prompt=True)
    assert go(template, turns(roles)) == wanted


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for m in messages %}{{ m.role + m.content | trim }}{% endfor %}",  # changes contents
        "{% for m in messages %}{{ loop.index ~ m.role + m.content }}{% endfor %}",  # counts
        "{% for m in messages %}{{ '{{' + m.role + m.content }}{% endfor %}",  # Go's own marks
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_ollama_has_no_words_for_is_refused(jinja):
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    tokenizer.chat_template = jinja
    with pytest.raises(UserError, match="no equal in a Modelfile"):
        ollama.go_template(tokenizer)


def test_a_modelfile_names_its_files_the_context_and_where_to_stop(out, base, tmp_path):
    head, _, tail = base.with_suffix(".Modelfile").read_text(encoding="utf-8").partition('"""')
    assert head == "FROM ./full_sft_64.gguf\nTEMPLATE "
    wanted = ["PARAMETER num_ctx 256", *(f'PARAMETER stop "<|im_{x}|>"' for x in ("start", "end"))]
    assert tail.partition('"""\n')[2].splitlines() == wanted
    adapter = convert(out, tmp_path / "square.gguf", lora_name="square")
    text = adapter.with_suffix(".Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./full_sft_64.gguf\nADAPTER ./square.gguf\n")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("same", None),
        (None, "does not exist yet"),
        ("other", "is another base"),
        ("noise", "is no GGUF file"),
    ],
)
def test_the_base_beside_an_adapter_is_the_one_that_it_is_for(
    out, base, tmp_path, capsys, there, said
):
    expected = tmp_path / base.name
    if there == "same":
        shutil.copy(base, expected)
    elif there == "other":
        convert(out, expected, skill="square")
    elif there == "noise":
        expected.write_text("mine")
    capsys.readouterr()
    convert(out, tmp_path / "x.gguf", lora_name="square")
    printed = capsys.readouterr().out
    assert f"the adapter is for {out / 'full_sft_64.pth'}, and expects" in printed
    notes = [line for line in printed.splitlines() if line.startswith("note: ")]
    assert len(notes) == (said is not None) and all(said in note for note in notes)


@pytest.mark.parametrize(
    ("begins", "text", "named"),
    [
        (True, "<|im_start|> $0", None),
        (False, "<|im_start|> $0", "begins every text with bos, but no chat"),
        (True, "$0 <|im_end|>", r"makes \['a', '<\|im_end\|>'\] of the text 'a'"),
        (True, "<|im_end|> $0", "can only put bos before it"),
    ],
)
def test_what_a_tokenizer_adds_to_a_text_is_added_there_or_refused(tmp_path, begins, text, named):
    """The shipped template begins every chat with bos; the other does not."""
    tokenizer, path = load_tokenizer(TOKENIZER_DIR), tmp_path / "x.gguf"
    ends = [(token, n) for n, token in ((1, "<|im_start|>"), (2, "<|im_end|>")) if token in text]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(text, None, ends)
    tokenizer.chat_template = tokenizer.chat_template if begins else "{{ messages[0].content }}"
    if named:
        with pytest.raises(UserError, match=f"{named}.*convert_hf_to_gguf.py"):
            gguf.save_base(seeded_model(SHAPE)[0], tokenizer, path, "float32")
        return
    gguf.save_base(seeded_model(SHAPE)[0], tokenizer, path, "float32")
    assert gguf.read_file(path)[0]["tokenizer.ggml.add_bos_token"] is True
    with llama_cpp(path) as ask:
        theirs = ask("/tokenize", content="a b", add_special=True)["tokens"]
        assert theirs == tokenizer("a b").input_ids and theirs[0] == 1
        chat = ask("/apply-template", messages=turns("su"))["prompt"]
        theirs = ask("/tokenize", content=chat, parse_special=True, add_special=True)["tokens"]
    ours = tokenizer.apply_chat_template(turns("su"), add_generation_prompt=True)
    assert theirs == ours["input_ids"]


@pytest.mark.parametrize(
    ("jinja", "said"),
    [
        ("{% for m in messages %}{{ loop.index ~ m.role + m.content }}{% endfor %}", "otherwise"),
        ("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}", "the date"),
    ],
)
def test_a_template_without_words_in_ollama_costs_only_the_modelfile(
    out, tmp_path, capsys, jinja, said
):
    shutil.copytree(out, tmp_path / "out")
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    tokenizer.chat_template = jinja
    tokenizer.save_pretrained(tmp_path / "out" / "tokenizer")
    record = tmp_path / "out" / "full_sft_64.json"
    known = json.loads(record.read_text()) | {"tokenizer": tokenizer_fingerprint(tokenizer)}
    record.write_text(json.dumps(known))
    path = convert(tmp_path / "out", tmp_path / "x.gguf")
    assert path.is_file() and not path.with_suffix(".Modelfile").exists()
    printed = capsys.readouterr().out
    assert "note: no x.Modelfile" in printed and said in printed


@pytest.mark.parametrize("more", [{}, {"lora_name": "all"}, {"dtype": "q4_0"}])
@pytest.mark.parametrize("module", ["attn_q", "attn_k"])
def test_the_self_check_sees_a_wrong_order_of_rows(out, tmp_path, monkeypatch, more, module):
    add, heads = gguf.add_tensor, {"attn_q": 4, "attn_k": 2}[module]

    def permuted(writer, name, tensor, dtype):
        wrong = module in name and not name.endswith("lora_a")
        add(writer, name, to_halves(tensor, heads) if wrong else tensor, dtype)

    monkeypatch.setattr(gguf, "add_tensor", permuted)
    with pytest.raises(UserError, match="computes something else"):
        convert(out, tmp_path / "x.gguf", **more)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"output": "x"}, "must be a file, whose name ends in .gguf"),
        ({"to": "peft", "lora_name": "all"}, "must be a folder"),
        ({"dtype": "q8_0", "to": "huggingface", "output": "x"}, "--to gguf only"),
        ({"lora_name": "square", "dtype": "q8_0"}, "no use for --dtype"),
        ({"lora_name": "square", "skill": "all"}, "no use for --skill"),
        ({"lora_name": "dora"}, "DoRA"),
        ({"lora_name": "none"}, "there is no skill file"),
        ({"output": "there.gguf"}, "there.gguf exists"),
        ({"output": "link.gguf"}, "link.gguf exists"),
        ({"output": "beside.gguf"}, "beside.Modelfile exists"),
        ({"output": "file/x.gguf"}, "cannot write"),
        ({"base": "foreign"}, "convert_hf_to_gguf.py"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(out, foreign, tmp_path, capsys, more, named):
    for name in ("there.gguf", "beside.Modelfile", "file"):
        (tmp_path / name).write_text("mine")
    with contextlib.suppress(OSError):  # Windows allows links to few
        (tmp_path / "link.gguf").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.iterdir())
    more = {"to": "gguf", "out_dir": out, "output": "x.gguf", **more}
    more["output"] = tmp_path / more["output"]
    if "base" in more:
        more["base"] = foreign
    with pytest.raises(SystemExit) as stopped:
        run(lambda: convert_model.main(flags(**more)))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert named in err and sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_without_the_package_the_way_to_get_it_is_said(out, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        convert(out, tmp_path / "x.gguf")


def test_rows_that_make_no_blocks_are_named(tmp_path, tokenizer):
    model, _ = seeded_model(SHAPE | {"dim": 48})
    with pytest.raises(UserError, match=r"tok_embeddings.weight has rows of 48.*float16"):
        gguf.save_base(model, tokenizer, tmp_path / "x.gguf", "q8_0")
    gguf.save_base(model, tokenizer, tmp_path / "x.gguf", "float16")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("pre_tokenizer", "add_prefix_space"), True, "add_prefix_space"),
        (("pre_tokenizer", "use_regex"), False, "use_regex"),
        (("normalizer",), {"type": "NFC"}, "normalizer"),
        (("model", "ignore_merges"), True, "ignore_merges"),
        (("added_tokens", 2, "rstrip"), True, "rstrip"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path, path, value, named):
    tokenizer, (*outer, last) = load_tokenizer(TOKENIZER_DIR), path
    content = part = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in outer:
        part = part[key]
    part[last] = value
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    with pytest.raises(UserError, match=named):
        gguf.save_base(seeded_model(SHAPE)[0], tokenizer, tmp_path / "x.gguf", "float32")
    assert not list(tmp_path.iterdir())
