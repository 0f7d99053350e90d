"""Benchmark scores are lm-evaluation-harness's, whatever is computed beside a row.

Every number is compared with plain float64: one row at a time, without batch, padding or window.
"""

import copy
import json
import math
import re
import shutil

import pytest
import torch
from conftest import flags, strengthen, write_rows
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.seeded_model import fill
from core.errors import run
from core.paths import TOKENIZER_DIR, lora_path
from dataset.chat import encode_chat
from dataset.choices import ChoiceQuestion, asked, clean_choices, language_of
from dataset.requests import Request, pair_requests, rolling_requests, text_ids
from dataset.rows import BadRow
from dataset.tokenizer import control_ids, load_tokenizer, tokenizer_fingerprint
from model.LMConfig import LMConfig
from model.lora.skill_file import SkillMeta, read_lora
from model.model import MiniMindLM
from model.model_lora import apply_lora, remove_lora, save_lora
from model.weights import RunRecord, load_base, save_base
from scripts.eval_benchmark import main
from trainer.likelihood import choice_scores, loglikelihoods, text_scores
from trainer.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
TEXTS = [
    "The cow says moo.\nAnd  the cat? ",
    "中文没有空格，一句话就是一个词。",
    "a",
    "one two " * 20,
]
CMMLU = {"Question": " 法国的首都是哪里？", "A": "巴黎", "B": "伦敦", "C": "柏林", "Answer": "B"}
MMLU = {"question": "Which says moo?", "choices": ["dog", "cow, of course", "猫"], "answer": 2}
ARC = {"question": "A colour?", "choices": {"text": ["red", "a dog"], "label": ["1", "2"]}}
ARC |= {"answerKey": "1"}
ROWS = [CMMLU, MMLU, ARC, {"question": "Six?", "options": {"A": "6", "B": "five"}, "answer": "6"}]
CHATS = [
    {"conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in (("Hi", "Hello, you."), ("2+2?", "4"), ("你好，你是谁？", "我是小石。"))
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A base of fixed random weights, two skills, and a file of each kind."""
    folder = tmp_path_factory.mktemp("benchmark")
    model = MiniMindLM(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256))
    fill(model.named_parameters())
    known = tokenizer_fingerprint(load_tokenizer(TOKENIZER_DIR))
    save_base(folder / "full_sft_32.pth", model, RunRecord(stage="full_sft", tokenizer=known))
    for seed, skill in enumerate(("a", "b")):
        apply_lora(model, 2 + seed, alpha=3.0)
        strengthen(model, seed)
        save_lora(model, lora_path(folder, skill, 32), SkillMeta(base={"file": "full_sft_32.pth"}))
        remove_lora(model)
    write_rows(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    write_rows(folder / "chats.jsonl", CHATS)
    write_rows(folder / "questions.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Hugging Face folder whose tokenizer, without a chat template, puts bos before a text."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "vocab_size": 6400, "max_position_embeddings": 64}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes))
    fill(theirs.named_parameters())
    theirs.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER_DIR).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = "<|im_start|>"
    backend.post_processor = processors.TemplateProcessing(f"{bos} $0", None, [(bos, 1)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@torch.no_grad()
def log_p(model, ids, n):
    """``log p`` of each of the last ``n`` ids after all before it: fp64 weights, one row."""
    logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double()
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]][-n:]


def mixed(out, **weights):
    """The base in fp64 with ``weight * scale * B @ A`` of each skill in its weights."""
    model = load_base(out / "full_sft_32.pth")[0].double()
    for name, weight in weights.items():
        tensors, meta = read_lora(lora_path(out, name, 32))
        for target, scale in meta.scaling.items():
            A, B = (tensors[f"{target}.lora.{x}.weight"].double() for x in "AB")
            model.get_submodule(target).weight.data += weight * scale * B @ A
    return model


def rolled(model, ids, length):
    """``log p`` of a text, token by token, each after what its window holds before it."""
    total = 0.0
    for n in range(len(ids)):
        start = n - n % length
        if start and start + length > len(ids):
            start = len(ids) - length  # the last window is filled up with what came before
        before = ids[start - 1 : n] if start else [1, *ids[:n]]
        total += float(log_p(model, [*before, ids[n]], 1).sum())
    return total


def check(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name


def naive_texts(model, tokenizer, length):
    total = sum(rolled(model, tokenizer(text).input_ids, length) for text in TEXTS)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    scores = {"word_perplexity": math.exp(-total / words)}
    scores["byte_perplexity"] = math.exp(-total / size)
    return scores | {"bits_per_byte": -total / size / math.log(2)}


def naive_questions(model, tokenizer, length, scored, language):
    """From the strings of each question alone."""
    hits = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for each in map(clean_choices, ROWS):
        context, answers = asked(each, scored, language)
        values = []
        for answer in answers:
            ids = tokenizer(f"{context} {answer}").input_ids
            n = len(ids) - len(tokenizer(context).input_ids)
            values.append(float(log_p(model, ids[-length - 1 :], n).sum()))
        sizes = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda t: len(t.encode())}
        for name, size in sizes.items():
            scaled = torch.tensor([v / size(a) for v, a in zip(values, answers, strict=True)])
            hits[name].append(float(scaled.argmax() == each.answer))
    found = {}
    for name, each in hits.items():
        each = torch.tensor(each, dtype=torch.float64)
        found |= {name: float(each.mean()), f"{name}_stderr": float(each.std() / len(each) ** 0.5)}
    return found


def naive_chats(model, tokenizer):
    nats, targets, bits, size = 0.0, 0, 0.0, 0
    for chat in CHATS:
        ids, learned = encode_chat(tokenizer, chat["conversations"])
        values = log_p(model, ids, len(ids) - 1)
        for token, flag, value in zip(ids[1:], learned[1:], values.tolist(), strict=True):
            nats, targets = nats - flag * value, targets + flag
            bits -= flag * (token not in control_ids(tokenizer)) * value / math.log(2)
        size += len(chat["conversations"][1]["content"].encode())
    loss = nats / targets
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits / size}


def test_every_score_of_the_base_and_of_a_mix_is_that_of_plain_float64(out, tmp_path, capsys):
    files = [str(out / f"{name}.jsonl") for name in ("texts", "chats", "questions")]
    argv = [*files, *flags(out_dir=out, device="cpu", skills=("a=0.7 b=-0.5",), max_seq_len=32)]
    found = main([*argv, *flags(batch_size=3, output=tmp_path / "new" / "s.json")])
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    for who, weights in (("base", {}), ("a=0.7 b=-0.5", {"a": 0.7, "b": -0.5})):
        model = mixed(out, **weights)
        texts, chats, questions = (entry["scores"][who] for entry in found["data"])
        check(texts, naive_texts(model, tokenizer, 32))
        check(chats, naive_chats(model, tokenizer))
        check(questions, naive_questions(model, tokenizer, 32, "letters", "zh"))
    assert found == json.loads((tmp_path / "new" / "s.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    table = [line.split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert table[0][1:] == ["score", "base", "a=0.7 b=-0.5 |"] and len(table) == 2 + 3 + 3 + 3
    assert table[8][0] == "| questions.jsonl: 4 questions (zh), chance 41.7 %"
    assert {len(line) for line in table} == {4}


def test_a_hugging_face_folder_is_scored_as_its_library_computes(llama, out, tmp_path):
    files = [str(out / f"{name}.jsonl") for name in ("texts", "questions")]
    argv = [*files, *flags(base=llama, out_dir=tmp_path, device="cpu", language="en")]
    found = main([*argv, *flags(scored="texts")])
    assert found["max_seq_len"] == 64
    model = LlamaForCausalLM.from_pretrained(llama).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert tokenizer("a").input_ids[0] == 1
    texts, questions = (entry["scores"]["base"] for entry in found["data"])
    check(texts, naive_texts(model, tokenizer, 64))
    check(questions, naive_questions(model, tokenizer, 64, "texts", "en"))


def test_a_description_comes_before_every_question(out, tmp_path, monkeypatch):
    said = []

    def recorded(tokenizer, context, *rest):
        said.append(context)
        return pair_requests(tokenizer, context, *rest)

    monkeypatch.setattr("dataset.requests.pair_requests", recorded)
    argv = [str(out / "questions.jsonl"), *flags(out_dir=out, device="cpu", most=2)]
    plain = main(argv)["data"][0]
    before = "以下是关于农学的单项选择题，请直接给出正确答案的选项。"
    told = main([*argv, "--description", before + r"\n\n"])["data"][0]
    assert said[2:] == [f"{before}\n\n{context}" for context in said[:2]]
    assert (plain["description"], told["description"]) == ("", f"{before}\n\n")


def test_a_file_is_asked_in_the_language_of_most_of_its_rows():
    chinese, english = clean_choices(CMMLU), clean_choices(ARC)
    assert language_of([english, chinese, english]) == "en"
    assert language_of([chinese, english, chinese]) == "zh"


def test_neither_batch_nor_padding_changes_a_likelihood(sharp_model):
    draw = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (1, 9), (40, 1), (3, 3), (90, 39), (1, 128), (17, 25), (2, 60)]
    rows = [torch.randint(0, 320, (a + b,), generator=draw).tolist() for a, b in sizes]
    requests = [Request(row[:a], row[a:]) for row, (a, _) in zip(rows, sizes, strict=True)]
    plain = copy.deepcopy(sharp_model).double()
    wanted = [float(log_p(plain, row, b).sum()) for row, (_, b) in zip(rows, sizes, strict=True)]
    sharp_model.train()
    for batch_size in (1, 3, 16):
        found = loglikelihoods(sharp_model, requests, CPU, batch_size)
        torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=1e-6, atol=1e-5)
    assert sharp_model.training and loglikelihoods(sharp_model, [], CPU, 4).shape == (0,)


def test_windows_predict_each_id_once_and_the_last_one_is_filled_up():
    assert rolling_requests([*range(10)], 99, 4) == [
        Request([99], [0, 1, 2, 3]),
        Request([3], [4, 5, 6, 7]),
        Request([5, 6, 7], [8, 9]),
    ]
    for length in (1, 2, 7):
        for count in range(20):
            windows = rolling_requests([*range(count)], 99, length)
            assert [n for each in windows for n in each.continuation] == [*range(count)]
            assert all(len(w.context + w.continuation) <= length + 1 for w in windows)


def test_an_answer_is_what_both_texts_have_beyond_the_question(tokenizer):
    first, second = pair_requests(tokenizer, "Which one?  ", ["A", "the  cat"], 64)
    whole = tokenizer("Which one?   the  cat").input_ids
    assert second.context + second.continuation == whole and first.context == second.context
    assert first.context == tokenizer("Which one?").input_ids
    (cut,) = pair_requests(tokenizer, "Which one?  ", ["the  cat"], len(second.continuation) + 1)
    assert cut == Request(second.context[-2:], second.continuation)
    spelled = text_ids(tokenizer, ["<|im_end|>"])[0]
    assert len(spelled) > 1 and control_ids(tokenizer).isdisjoint(spelled)


def test_the_likeliest_answer_depends_on_what_it_is_divided_by():
    question = ChoiceQuestion("?", ("aaaa", "猫猫", "bb"), 1)
    texts = [question.choices] * 3
    scores = choice_scores([question] * 3, texts, [[-8, -8, -1], [-8, -1, -4], [-4, -3, -8]])
    shares = {name: scores[name] for name in ("acc", "acc_norm", "acc_bytes")}
    assert shares == {"acc": 2 / 3, "acc_norm": 1 / 3, "acc_bytes": 2 / 3}
    assert scores["acc_norm_stderr"] == pytest.approx(1 / 3)
    alone = choice_scores([question], [question.choices], [[-1, -1, -1]])
    assert alone["acc"] == 0 and math.isnan(alone["acc_stderr"])
    assert text_scores(["没有空格" * 99], [-2000.0])["word_perplexity"] == math.inf


def test_each_style_is_asked_in_the_words_of_its_benchmark():
    questions = [clean_choices(row) for row in ROWS]
    assert [each.answer for each in questions] == [1, 2, 0, 0]
    zh, letters = asked(questions[0], "letters", "zh")
    assert zh == "法国的首都是哪里？\nA. 巴黎\nB. 伦敦\nC. 柏林\n答案：" and letters == [
        "A",
        "B",
        "C",
    ]
    en, _ = asked(questions[1], "letters", "en")
    assert en == "Which says moo?\nA. dog\nB. cow, of course\nC. 猫\nAnswer:"
    assert asked(questions[2], "texts", "en") == (
        "Question: A colour?\nAnswer:",
        ["red", "a dog"],
    )


@pytest.mark.parametrize(
    ("labels", "answer", "wanted"),
    [
        ([1, 2, 3], 1, 0),
        (["1", "2", "3"], 3, 2),
        (["1", "2", "3"], "3", 2),
        ([0, 1, 2], 1, 1),
        (["1", "B", "C"], 1, 0),
        (["A", "B", "C"], 1, 1),
        ([1, 2, 3], 0, None),
        (["1", "B", "C"], 2, None),
        (["7", "7", "8"], 7, None),
    ],
)
def test_a_number_is_a_label_where_labels_are_numbers(labels, answer, wanted):
    texts = ["2", "1", "0"]  # no number means a text
    row = {"question": "?", "choices": {"text": texts, "label": labels}, "answer": answer}
    if wanted is None:
        with pytest.raises(BadRow, match=f"the answer {answer}"):
            clean_choices(row)
    else:
        assert clean_choices(row).answer == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 3}, "the answer 3 is none of the choices A, B, C, counted from 0"),
        ({"answer": True}, "the answer True is none"),
        ({"answer": "b"}, "the answer 'b' is none"),
        ({"answer": None}, "none of its keys ('question', 'choices') the answer"),
        ({"label": 1}, "answer and label are both the answer"),
        ({"choices": ["B", "x", "C"], "answer": "B"}, "the answer 'B' is more than one"),
        ({"choices": ["x"]}, "1 choices; give from 2 to 26"),
        ({"choices": ["x", 2]}, "choice B is not text but a number"),
        ({"choices": ["x", " "]}, "choice B is empty"),
        ({"choices": "x, y"}, '"choices" is no list of texts'),
        ({"choices": {"text": ["x", "y"], "label": ["A"]}}, "2 texts for 1 labels"),
        ({"choices": None, "A": "x"}, "no choices among its keys"),
        ({"question": " "}, '"question" is empty'),
    ],
)
def test_a_bad_question_is_named(change, said):
    row = {key: value for key, value in (MMLU | change).items() if value is not None}
    with pytest.raises(BadRow, match=re.escape(said)):
        clean_choices(row)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{f}/nowhere.jsonl", "data file {f}/nowhere.jsonl does not exist"),
        ("{f}/bad.jsonl", "{f}/bad.jsonl:2: the answer 9 is none of the choices A, B, C"),
        ("{f}/empty.jsonl", "{f}/empty.jsonl holds no rows"),
        ("{f}/other.jsonl", "no style of chats has its keys ('q1')"),
        ("{f}/chats.jsonl --base {f}/llama", "{f}/llama has no chat template"),
        ("{f}/texts.jsonl --skills nobody", "there is no skill file"),
        ("{f}/texts.jsonl --max_seq_len 257", "exceeds the model's context of 256"),
        ("{f}/texts.jsonl --max_seq_len 1", "--max_seq_len 1 is too short"),
        (
            "{f}/questions.jsonl --max_seq_len 2 --scored texts",
            "questions.jsonl:1: the answer '巴黎' has",
        ),
        ("{f}/texts.jsonl --description x", "which none of the files holds"),
        ("{f}/texts.jsonl {f}/bad.jsonl", "{f}/bad.jsonl:2: the answer 9 is none"),
        ("{f}/texts.jsonl --output {f}/empty.jsonl/s.json", "cannot write {f}/empty.jsonl/s.json"),
        ("{f}/texts.jsonl --output {f}/s.txt", "--output {f}/s.txt must end in .json"),
        ("{f}/texts.jsonl --output {f}/full_sft_32.json", "full_sft_32.json exists"),
        ("{f}/texts.jsonl --skills base", "'base' is not a skill name"),
    ],
)
def test_a_mistake_is_one_line(words, said, out, llama, tmp_path, capsys):
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    shutil.copytree(llama, tmp_path / "llama")
    record = (tmp_path / "full_sft_32.json").read_bytes()
    write_rows(tmp_path / "bad.jsonl", [MMLU, MMLU | {"answer": 9}])
    write_rows(tmp_path / "other.jsonl", [{"q1": "x"}])
    (tmp_path / "empty.jsonl").touch()
    argv = [word.replace("{f}", str(tmp_path)) for word in words.split()]
    argv += ["--device", "cpu", "--out_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main(argv))
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    errors = err.splitlines()  # nothing was scored before
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert said.replace("{f}", str(tmp_path)) in errors[0]
    assert (tmp_path / "full_sft_32.json").read_bytes() == record
