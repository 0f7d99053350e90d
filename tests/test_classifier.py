"""Text classifiers: their batches, scores, files and door, transformers beside them."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU, flags, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from core.errors import UserError
from core.paths import metrics_path
from dataset.batches import masked
from dataset.labelled import LabelledSamples
from model.classifier import (
    check_row_length,
    class_loss_sum,
    head_of,
    head_state,
    open_classifier,
)
from model.lora.layer import lora_parameters
from model.lora.skill_file import adapters_in, read_lora
from model.model_lora import apply_lora, save_lora
from model.quantized import quantize
from model.weights import load_base
from scripts.train_lora_classifier import main as train_classifier
from trainer.scores import score, scores_of

WORDS = [
    "good",
    "fine",
    "great",
    "bad",
    "poor",
    "awful",
    "the",
    "film",
    "was",
    "and",
    "story",
    "very",
]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
SIZES |= {"vocab_size": 32, "max_position_embeddings": 64}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"device": "cpu", "epochs": 6, "batch_size": 8, "learning_rate": 0.01, "max_seq_len": 32}


def bert_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """``bert``, and ``electra``, whose head has more than one layer."""
    root = tmp_path_factory.mktemp("encoders")
    for name, kind, config in (
        ("bert", BertModel, BertConfig),
        ("electra", ElectraModel, ElectraConfig),
    ):
        torch.manual_seed(0)
        kind(config(**SIZES, initializer_range=0.1)).save_pretrained(root / name)
        bert_tokenizer().save_pretrained(root / name)
    BertModel(BertConfig(**SIZES, initializer_range=0.1), add_pooling_layer=False).save_pretrained(
        root / "unpooled"
    )
    bert_tokenizer().save_pretrained(root / "unpooled")
    return root


def reviews(count: int, seed: int) -> list[dict]:
    """Labelled by the one word of praise or blame among others."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = int(rng.integers(2))
        words = [
            *rng.choice(WORDS[6:], rng.integers(2, 9)),
            WORDS[3 * (1 - label) + int(rng.integers(3))],
        ]
        rows.append({"text": " ".join(rng.permutation(words)), "label": label})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    return write_rows(folder / "train.jsonl", reviews(160, 0)), write_rows(
        folder / "dev.jsonl", reviews(80, 1)
    )


def test_a_batch_is_what_the_library_pads():
    tokenizer = bert_tokenizer()
    rows = [
        {"text": "the film " * n, "text_pair": "was very good", "label": str(n % 2)}
        for n in range(1, 9)
    ]
    samples = LabelledSamples(rows, ["0", "1"], tokenizer, 12, pairs=True)
    chosen = np.array([6, 0, 3])
    batch = samples.collate(chosen)
    texts, pairs = [rows[n]["text"] for n in chosen], [rows[n]["text_pair"] for n in chosen]
    wanted = tokenizer(
        texts, pairs, truncation=True, max_length=12, padding=True, return_tensors="pt"
    )
    assert batch.inputs.keys() == wanted.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    for key, value in wanted.items():
        assert torch.equal(batch.inputs[key], value), key
    assert batch.labels.tolist() == [1, 1, 0] and batch.n_targets == 3
    assert batch.n_tokens == int(wanted["attention_mask"].sum())
    assert samples.lengths.tolist() == [8, 10, 12, 12, 12, 12, 12, 12] and samples.truncated == 6


def test_scores_are_those_of_their_definitions():
    tp, fn, fp, tn = 31, 9, 14, 46
    found = scores_of(torch.tensor([[tn, fp], [fn, tp]], dtype=torch.float64), 0.5)
    assert found.accuracy == (tp + tn) / 100 and found.targets == 100
    assert found.f1 == pytest.approx(2 * tp / (2 * tp + fp + fn))
    spread = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert found.mcc == pytest.approx((tp * tn - fp * fn) / spread)
    table = np.array([[5, 2, 1], [0, 7, 3], [4, 0, 8]])
    pairs = np.array([(t, p) for t in range(3) for p in range(3) for _ in range(table[t, p])])
    x, y = np.eye(3)[pairs[:, 0]], np.eye(3)[pairs[:, 1]]
    covariance = [((a - a.mean(0)) * (b - b.mean(0))).sum() for a, b in ((x, y), (x, x), (y, y))]
    found = scores_of(torch.tensor(table, dtype=torch.float64), 0.5)
    assert found.mcc == pytest.approx(covariance[0] / (covariance[1] * covariance[2]) ** 0.5)
    parts = [2 * table[k, k] / (table[k].sum() + table[:, k].sum()) for k in range(3)]
    assert found.f1 == pytest.approx(sum(parts) / 3)
    always = scores_of(torch.tensor([[0.0, 6.0], [0.0, 4.0]], dtype=torch.float64), 0.5)
    assert (always.accuracy, always.mcc) == (0.4, 0.0)


def test_a_score_does_not_depend_on_the_batches(bases):
    torch.manual_seed(1)
    model = open_classifier(bases / "bert", ["0", "1"])
    rows = [{**row, "text_pair": None, "label": str(row["label"])} for row in reviews(40, 2)]
    samples = LabelledSamples(rows, ["0", "1"], bert_tokenizer(), 32, pairs=False)
    one_by_one = [samples.collate(np.array([n])) for n in range(40)]
    together = score(model, [samples.collate(np.arange(40))], CPU)
    alone = score(model, one_by_one, CPU)
    assert (
        together.loss == pytest.approx(alone.loss, rel=1e-5) and together.accuracy == alone.accuracy
    )
    model.eval()
    with torch.no_grad():
        right = [int(model(**b.inputs).logits.argmax()) == int(b.labels) for b in one_by_one]
        nats = sum(float(class_loss_sum(model, batch)) for batch in one_by_one)
    assert alone.accuracy == sum(right) / 40 and alone.loss == pytest.approx(nats / 40, rel=1e-5)
    assert score(model, [], CPU).targets == 0
    loss = class_loss_sum(model, masked(one_by_one[0]))
    loss.backward()
    assert loss.item() == 0 and not any(
        p.grad.any() for p in model.parameters() if p.grad is not None
    )


def test_what_trains_is_what_peft_trains(bases):
    peft = pytest.importorskip("peft")
    model = open_classifier(bases / "electra", ["a", "b", "c"])
    apply_lora(model.base_model, 8, 16, ["query", "value"])
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ours == sum(p.numel() for p in [*lora_parameters(model), *head_state(model).values()])
    theirs = AutoModelForSequenceClassification.from_pretrained(bases / "electra", num_labels=3)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(peft.TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    )
    assert ours == theirs.get_nb_trainable_parameters()[0]
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("name", ["bert", "electra"])
def test_a_skill_is_learned_resumed_and_asked(bases, data, tmp_path, capsys, name):
    train, dev = data
    argv = flags(
        base=bases / name,
        data_path=train,
        val_path=dev,
        lora_name="review",
        save_interval=50,
        **SMALL,
    )
    path = train_classifier([*argv, *flags(out_dir=tmp_path / "whole" / "out")])
    meta = read_lora(path)[1]
    assert meta.metrics["val"]["last"]["accuracy"] > 0.95 and meta.labels == ["0", "1"]
    assert "trained whole: classifier" in capsys.readouterr().out

    *steps, last = map(
        json.loads, metrics_path(tmp_path / "whole" / "out", path.stem).read_text().splitlines()
    )
    assert last["summary"]["first_loss"] == pytest.approx(0.7, abs=0.2), "the mean of a step's rows"
    rates = {line["step"]: line["lr"] / SMALL["learning_rate"] for line in steps if "lr" in line}
    assert rates[1] == pytest.approx(1 / 8) and rates[10] == pytest.approx(1 - 2 / 113), (
        "7 steps of 120 warm up"
    )
    assert rates[120] == pytest.approx(1 / 113), "and all others decay"

    out = tmp_path / "parts" / "out"
    train_classifier([*argv, *flags(out_dir=out)])  # the state after step 50 is still there
    states = sorted((out / "checkpoints" / path.stem).iterdir())
    shutil.rmtree(states[-1])
    again = train_classifier([*argv, *flags(out_dir=out), "--resume"])
    assert "resumed at step 100 of 120" in capsys.readouterr().out
    assert again.read_bytes() == path.read_bytes()

    questions = write_rows(
        tmp_path / "questions.jsonl", [{"text": row["text"]} for row in reviews(30, 3)]
    )
    asked = flags(base=bases / name, lora_name="review", predict=questions, device="cpu")
    train_classifier([*asked, *flags(out_dir=out)])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [
        answer["label"] == str(row["label"])
        for answer, row in zip(answers, reviews(30, 3), strict=True)
    ]
    assert sum(right) >= 28 and all(0.5 <= answer["probability"] <= 1 for answer in answers)

    with pytest.raises(UserError, match=r"there is no skill file .*lora_review"):
        train_classifier([*asked, *flags(out_dir=tmp_path / "nowhere")])


def test_full_fine_tuning_leaves_a_folder_of_the_library(bases, data, tmp_path):
    train, dev = data
    argv = flags(
        base=bases / "bert",
        data_path=train,
        val_path=dev,
        lora_name="whole",
        out_dir=tmp_path,
        **SMALL,
    )
    folder = train_classifier([*argv, "--full", "--learning_rate", "0.002"])
    ask = pipeline("text-classification", model=str(folder))
    rows = reviews(30, 3)
    answers = ask([row["text"] for row in rows])
    assert (
        sum(answer["label"] == str(row["label"]) for answer, row in zip(answers, rows, strict=True))
        >= 28
    )
    assert folder == tmp_path / "classifier_whole" and not list(tmp_path.glob(".*"))


def test_a_body_in_four_bits(bases, data, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="pip install -r requirements-4bit.txt")
    train, dev = data
    argv = flags(base=bases / "bert", lora_name="small", out_dir=tmp_path, device="cpu")
    path = train_classifier(
        [*argv, *flags(data_path=train, val_path=dev, **SMALL), "--load_in_4bit"]
    )
    assert read_lora(path)[1].metrics["val"]["last"]["accuracy"] > 0.95
    assert "Linears in NF4" in capsys.readouterr().out
    train_classifier([*argv, *flags(predict=train)])
    said = capsys.readouterr()
    assert "Linears in NF4" in said.err, "as it was trained"
    answers = [json.loads(line)["label"] for line in said.out.splitlines()]
    assert (
        np.mean(
            [
                answer == str(row["label"])
                for answer, row in zip(answers, reviews(160, 0), strict=True)
            ]
        )
        > 0.95
    )


def test_weights_that_the_base_lacks_learn_too(bases, data, tmp_path, capsys):
    train, dev = data
    argv = flags(base=bases / "unpooled", lora_name="x", out_dir=tmp_path, device="cpu")
    path = train_classifier([*argv, *flags(data_path=train, val_path=dev, **SMALL)])
    assert "bert.pooler.dense.weight" in head_of(read_lora(path)[0])
    capsys.readouterr()
    train_classifier([*argv, *flags(predict=dev, seed=5)])
    answers = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    right = np.mean(
        [answer == str(row["label"]) for answer, row in zip(answers, reviews(80, 1), strict=True)]
    )
    assert right == read_lora(path)[1].metrics["val"]["last"]["accuracy"] > 0.9
    with pytest.raises(
        UserError, match="lacks weights, which 4 bits cannot learn; drop --load_in_4bit"
    ):
        train_classifier([*argv, *flags(data_path=train, max_seq_len=32), "--load_in_4bit"])


def test_a_row_is_answered_as_the_classifier_was_trained(bases, data, tmp_path):
    """Other texts, another tokenizer and another base are refused; length and 4 bits come from the
    file.
    """
    train, dev = data
    argv = flags(base=bases / "bert", lora_name="x", out_dir=tmp_path, device="cpu")
    learn = flags(data_path=train, **SMALL | {"epochs": 1})
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{**row, "text_pair": "fine"} for row in reviews(9, 4)]
    )
    with pytest.raises(
        UserError,
        match="these rows have a text and a text_pair, where the classifier reads one text",
    ):
        train_classifier([*argv, *learn, *flags(val_path=pairs)])
    path = train_classifier([*argv, *learn])
    meta = read_lora(path)[1]
    train_classifier(
        [*argv, *flags(predict=write_rows(tmp_path / "long.jsonl", [{"text": "very good " * 99}]))]
    )
    assert meta.pairs is False and meta.metrics["val"]["last"]["step"] == meta.metrics["step"]
    with pytest.raises(UserError, match="where the classifier reads one text"):
        train_classifier([*argv, *flags(predict=pairs)])
    other = shutil.copytree(bases / "bert", tmp_path / "other")
    spelled = (other / "tokenizer.json").read_text().replace('"good"', '"nice"')
    (other / "tokenizer.json").write_text(spelled)
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        train_classifier([*argv, *flags(predict=dev, tokenizer_path=other)])
    BertModel(BertConfig(**SIZES)).save_pretrained(other)
    with pytest.raises(
        UserError, match=r"was trained on bert .*, but this model is \w+; use that base$"
    ):
        train_classifier(
            [*argv, *flags(predict=dev, tokenizer_path=bases / "bert"), "--base", str(other)]
        )
    with pytest.raises(
        UserError, match="--predict reads rows as in training: leave out --bad_rows"
    ):
        train_classifier([*argv, *flags(predict=dev, bad_rows="skip")])
    tensors = torch.load(path)
    bad_length = {"max_seq_len": None, "options": {"max_seq_len": "x"}}
    for damaged in ({"labels": [["0"], ["1"]]}, {"labels": ["0", "0"]}, bad_length):
        packed = json.dumps(json.loads(bytes(tensors["_meta"].tolist())) | damaged).encode()
        torch.save(
            tensors | {"_meta": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}, path
        )
        with pytest.raises(UserError, match="is no classifier"):
            train_classifier([*argv, *flags(predict=dev)])


def test_a_decision_at_the_end_of_the_text_needs_a_tokenizer_that_ends_it(data, tmp_path):
    """T5 and BART read the class there; T5 keeps ``wo`` out of 4 bits."""
    train, dev = data
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 32,
    }
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(**sizes, eos_token_id=3, decoder_start_token_id=0)
    ).save_pretrained(tmp_path)
    tokenizer = bert_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    learn = flags(
        base=tmp_path,
        out_dir=tmp_path / "out",
        data_path=train,
        val_path=dev,
        **SMALL | {"epochs": 1},
    )
    assert train_classifier([*learn, "--target_modules", "q", "v"]).is_file()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not end a text, where this model decides"):
        train_classifier([*learn, "--target_modules", "q", "v"])


def test_a_decoder_is_a_classifier_too(data, tmp_path, capsys):
    """Its tokenizer pads with the end; its last token that is no padding decides. A chat does not
    take such a skill.
    """
    train, dev = data
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=2, eos_token_id=3)).save_pretrained(
        tmp_path / "base"
    )
    tokenizer = bert_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path / "base")
    argv = flags(base=tmp_path / "base", lora_name="x", out_dir=tmp_path, device="cpu")
    learn = flags(
        data_path=train,
        val_path=dev,
        target_modules="all-linear",
        **SMALL | {"learning_rate": 0.003},
    )
    path = train_classifier([*argv, *learn])
    capsys.readouterr()
    train_classifier([*argv, *flags(predict=dev)])
    answers = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    right = np.mean(
        [answer == str(row["label"]) for answer, row in zip(answers, reviews(80, 1), strict=True)]
    )
    assert right == read_lora(path)[1].metrics["val"]["last"]["accuracy"] > 0.8
    chat, small = (load_base(tmp_path / "base")[0] for _ in range(2))
    quantize(small)
    for model in (chat, small):
        with pytest.raises(UserError, match="is more than a LoRA: _head"):
            adapters_in(model, path)
    meta = read_lora(path)[1]
    apply_lora(chat, 2)
    save_lora(chat, tmp_path / "again.pth", meta)
    assert head_of(read_lora(tmp_path / "again.pth")[0]) == {}


def test_training_goes_on_from_a_classifiers_own_head(bases, data, tmp_path):
    """Whatever the order of its labels: a rate of nearly nothing leaves it as good as it was."""
    model = open_classifier(bases / "bert", ["1", "0"])
    model.save_pretrained(tmp_path / "base")
    bert_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{**row, "text_pair": None, "label": str(row["label"])} for row in reviews(80, 1)]
    samples = LabelledSamples(rows, ["1", "0"], bert_tokenizer(), 32, pairs=False)
    before = score(model, [samples.collate(np.arange(80))], CPU)
    flat = SMALL | {"learning_rate": 1e-12, "epochs": 1, "max_steps": 1}
    argv = flags(
        base=tmp_path / "base", data_path=data[0], val_path=data[1], out_dir=tmp_path, **flat
    )
    meta = read_lora(train_classifier(argv))[1]
    assert meta.labels == ["1", "0"]
    assert meta.metrics["val"]["last"]["loss"] == pytest.approx(before.loss, rel=1e-4)


def test_a_base_that_is_a_classifier_keeps_its_head_and_the_order_of_its_labels(bases, tmp_path):
    torch.manual_seed(0)
    made = open_classifier(bases / "bert", ["yes", "no"])
    assert list(made.config.id2label.values()) == ["yes", "no"]
    made.save_pretrained(tmp_path)
    again = open_classifier(tmp_path, ["no", "yes"])
    assert list(again.config.id2label.values()) == ["yes", "no"]
    assert torch.equal(again.classifier.weight, made.classifier.weight)
    torch.manual_seed(1)
    for others in (["a", "b"], ["no", "yes", "maybe"]):
        drawn = open_classifier(tmp_path, others)
        assert list(drawn.config.id2label.values()) == others
        assert not torch.equal(drawn.classifier.weight[:2], made.classifier.weight)
        assert torch.equal(drawn.bert.pooler.dense.weight, made.bert.pooler.dense.weight)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "model_type"])
def test_a_base_whose_config_is_not_its_own_is_refused(bases, tmp_path, key):
    base = shutil.copytree(bases / "bert", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config[key] = {"hidden_size": 64, "num_hidden_layers": 3, "model_type": "electra"}[key]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"of the shape that its config\.json says"):
        open_classifier(base, ["a", "b"])


def test_what_a_text_spells_is_no_control_token():
    row = {"text": "the [SEP] film [PAD]", "text_pair": None, "label": "a"}
    ids = LabelledSamples([row], ["a", "b"], bert_tokenizer(), 32, pairs=False).columns[
        "input_ids"
    ][0]
    assert ids[0] == 2 and ids[-1] == 3 and not {0, 2, 3} & set(ids[1:-1])


def test_positions_that_begin_after_the_padding_leave_less_room():
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES))
    check_row_length(model, 62)
    model(torch.full((1, 62), 5))
    with pytest.raises(UserError, match="exceeds the model's context of 64"):
        check_row_length(model, 63)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 63), 5))


def test_runs_of_other_names_keep_apart(bases, data, tmp_path):
    argv = flags(base=bases / "bert", data_path=data[0], out_dir=tmp_path, **SMALL | {"epochs": 1})
    for name in ("v1.1", "v1.2"):
        train_classifier([*argv, "--full", "--lora_name", name])
    assert {path.stem for path in (tmp_path / "metrics").glob("*.jsonl")} == {
        "classifier_v1.1",
        "classifier_v1.2",
    }
    itself = flags(base=tmp_path / "classifier_v1.1", data_path=data[0], out_dir=tmp_path, **SMALL)
    with pytest.raises(
        UserError, match=r"classifier_v1\.1 is --base itself; choose another --lora_name"
    ):
        train_classifier([*itself, "--full", "--lora_name", "v1.1"])


def test_other_validation_rows_are_another_run(bases, data, tmp_path):
    dev = shutil.copy(data[1], tmp_path / "dev.jsonl")
    argv = flags(
        base=bases / "bert",
        data_path=data[0],
        val_path=dev,
        out_dir=tmp_path / "out",
        **SMALL | {"epochs": 1},
    )
    train_classifier(argv)
    write_rows(tmp_path / "dev.jsonl", reviews(9, 7))
    with pytest.raises(UserError, match="file 1 of val_path"):
        train_classifier([*argv, "--resume"])


@pytest.mark.parametrize(
    "words, reason",
    [
        (
            ["--base", "BASE", "--data_path", "TRAIN", "--full", "--rank", "4"],
            "--full trains no LoRA: leave out --r",
        ),
        (
            ["--base", "BASE", "--data_path", "TRAIN", "--val_path", "NEW"],
            r"new\.jsonl:1: .label. 7 is none of those to",
        ),
        (["--base", "none", "--data_path", "TRAIN"], "base none is neither a folder"),
        (
            ["--base", "BASE", "--data_path", "ONE", "--max_seq_len", "9"],
            "all rows have the label|holds out all",
        ),
        ([], "name a pretrained model with --base"),
        (["--base", "BASE"], "name rows with --data_path, or a file with --predict"),
        (
            ["--base", "BASE", "--data_path", "TRAIN", "--full", "--load_in_4bit"],
            "--full trains all weights",
        ),
        (
            ["--base", "BASE", "--predict", "TRAIN", "--full"],
            "reads rows as in training: leave out --full",
        ),
        (
            ["--base", "TRAIN", "--data_path", "TRAIN"],
            "cannot be read|is neither a folder with a config.json",
        ),
        (
            ["--base", "BASE", "--data_path", "TRAIN", "--max_seq_len", "65"],
            "exceeds the model's context of 64",
        ),
        (
            [
                "--base",
                "BASE",
                "--data_path",
                "TRAIN",
                "--max_seq_len",
                "9",
                "--target_modules",
                "wq",
            ],
            "wq",
        ),
        (
            ["--base", "BASE", "--data_path", "TRAIN", "--warmup_ratio", "1"],
            "warmup_ratio=1.0 must be",
        ),
        (
            ["--base", "BASE", "--data_path", "TRAIN", "--decay_ratio", "0"],
            "decay_ratio=0.0 must be",
        ),
    ],
)
def test_a_wrong_flag_is_named(bases, data, tmp_path, words, reason):
    one = write_rows(tmp_path / "one.jsonl", [{"text": "the film", "label": 1}])
    new = write_rows(tmp_path / "new.jsonl", [{"text": "the film", "label": 7}])
    places = {"BASE": str(bases / "bert"), "TRAIN": str(data[0]), "ONE": str(one), "NEW": str(new)}
    with pytest.raises(UserError, match=reason):
        train_classifier(
            [places.get(word, word) for word in words]
            + ["--out_dir", str(tmp_path), "--device", "cpu"]
        )
    assert not (tmp_path / "lora").exists()
