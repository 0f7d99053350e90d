"""Text classifiers: their batches, scores, files and door, transformers beside them."""

import json
import shutil
from functools import partial

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
from model.weights import load_base
from scripts.train_lora_classifier import main as train_classifier
from trainer.scores import score, scores_of

PRAISE, BLAME = ["good", "fine", "great"], ["bad", "poor", "awful"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
REST = ["the", "film", "was", "and", "story", "very"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "vocab_size": 32, "max_position_embeddings": 64}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"device": "cpu", "epochs": 6, "batch_size": 8, "learning_rate": 0.01, "max_seq_len": 32}


def bert_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *PRAISE, *BLAME, *REST])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """``bert``, ``unpooled`` without the layer that its head needs, ``electra`` with two there."""
    root = tmp_path_factory.mktemp("encoders")
    kinds = {"bert": (BertModel, BertConfig), "electra": (ElectraModel, ElectraConfig)}
    kinds["unpooled"] = (partial(BertModel, add_pooling_layer=False), BertConfig)
    for name, (kind, config) in kinds.items():
        torch.manual_seed(0)
        kind(config(**SIZES, initializer_range=0.1)).save_pretrained(root / name)
        bert_tokenizer().save_pretrained(root / name)
    return root


def reviews(count: int, seed: int) -> list[dict]:
    """Labelled by the one word of praise or blame among others."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = int(rng.integers(2))
        words = [*rng.choice(REST, rng.integers(2, 9)), rng.choice([BLAME, PRAISE][label])]
        rows.append({"text": " ".join(rng.permutation(words)), "label": label})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    train = write_rows(folder / "train.jsonl", reviews(160, 0))
    return train, write_rows(folder / "dev.jsonl", reviews(80, 1))


def samples_of(rows: list[dict], labels: list[str]) -> LabelledSamples:
    """What the door makes of ``reviews``."""
    rows = [{**row, "text_pair": None, "label": str(row["label"])} for row in rows]
    return LabelledSamples(rows, labels, bert_tokenizer(), 32, pairs=False)


def share_right(answers: list[dict], rows: list[dict]) -> float:
    pairs = zip(answers, rows, strict=True)
    return np.mean([answer["label"] == str(row["label"]) for answer, row in pairs])


def answers_in(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_batch_is_what_the_library_pads():
    tokenizer = bert_tokenizer()
    rest = {"text_pair": "was very good"}
    rows = [{"text": "the film " * n, "label": str(n % 2)} | rest for n in range(1, 9)]
    samples = LabelledSamples(rows, ["0", "1"], tokenizer, 12, pairs=True)
    chosen = np.array([6, 0, 3])
    batch = samples.collate(chosen)
    texts, pairs = [rows[n]["text"] for n in chosen], [rows[n]["text_pair"] for n in chosen]
    settings = {"truncation": True, "max_length": 12, "padding": True, "return_tensors": "pt"}
    wanted = tokenizer(texts, pairs, **settings)
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
    samples = samples_of(reviews(40, 2), ["0", "1"])
    one_by_one = [samples.collate(np.array([n])) for n in range(40)]
    together = score(model, [samples.collate(np.arange(40))], CPU)
    alone = score(model, one_by_one, CPU)
    assert together.loss == pytest.approx(alone.loss, rel=1e-5)
    assert together.accuracy == alone.accuracy
    model.eval()
    with torch.no_grad():
        right = [int(model(**b.inputs).logits.argmax()) == int(b.labels) for b in one_by_one]
        nats = sum(float(class_loss_sum(model, batch)) for batch in one_by_one)
    assert alone.accuracy == sum(right) / 40 and alone.loss == pytest.approx(nats / 40, rel=1e-5)
    assert score(model, [], CPU).targets == 0
    loss = class_loss_sum(model, masked(one_by_one[0]))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.item() == 0 and gradients and not any(grad.any() for grad in gradients)


def test_what_trains_is_what_peft_trains(bases):
    peft = pytest.importorskip("peft")
    model = open_classifier(bases / "electra", ["a", "b", "c"])
    apply_lora(model.base_model, 8, 16, ["query", "value"])
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ours == sum(p.numel() for p in [*lora_parameters(model), *head_state(model).values()])
    theirs = AutoModelForSequenceClassification.from_pretrained(bases / "electra", num_labels=3)
    settings = peft.LoraConfig(peft.TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    theirs = peft.get_peft_model(theirs, settings)
    assert ours == theirs.get_nb_trainable_parameters()[0]
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("name", ["bert", "electra"])
def test_a_skill_is_learned_resumed_and_asked(bases, data, tmp_path, capsys, name):
    whole, cut = (tmp_path / folder / "out" for folder in ("whole", "cut"))
    argv = flags(base=bases / name, data_path=data[0], val_path=data[1], lora_name="review")
    argv += flags(save_interval=50, **SMALL)
    path = train_classifier([*argv, *flags(out_dir=whole)])
    meta = read_lora(path)[1]
    assert meta.metrics["val"]["last"]["accuracy"] > 0.95 and meta.labels == ["0", "1"]
    assert "trained whole: classifier" in capsys.readouterr().out

    *steps, last = answers_in(metrics_path(whole, path.stem).read_text())
    assert last["summary"]["first_loss"] == pytest.approx(0.7, abs=0.2), "the mean of a step's rows"
    rates = {line["step"]: line["lr"] / SMALL["learning_rate"] for line in steps if "lr" in line}
    # 7 steps of 120 warm up, and all others decay.
    found = [rates[1], rates[10], rates[120]]
    assert found == pytest.approx([1 / 8, 1 - 2 / 113, 1 / 113])

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / path.stem / "step-120")
    again = train_classifier([*argv, *flags(out_dir=cut), "--resume"])
    assert "resumed at step 100 of 120" in capsys.readouterr().out
    assert again.read_bytes() == path.read_bytes()

    rows = [{"text": row["text"]} for row in reviews(30, 3)]
    asked = flags(base=bases / name, lora_name="review", device="cpu")
    asked += flags(predict=write_rows(tmp_path / "questions.jsonl", rows))
    train_classifier([*asked, *flags(out_dir=cut)])
    answers = answers_in(capsys.readouterr().out)
    assert share_right(answers, reviews(30, 3)) > 0.9
    assert all(0.5 <= answer["probability"] <= 1 for answer in answers)
    with pytest.raises(UserError, match="lora_review"):
        train_classifier([*asked, *flags(out_dir=tmp_path / "nowhere")])


def test_full_fine_tuning_leaves_a_folder_of_the_library(bases, data, tmp_path):
    argv = flags(base=bases / "bert", data_path=data[0], lora_name="whole", out_dir=tmp_path)
    argv += flags(**SMALL | {"learning_rate": 0.002})
    folder = train_classifier([*argv, "--full"])
    answers = pipeline("text-classification", str(folder))([row["text"] for row in reviews(30, 3)])
    assert share_right(answers, reviews(30, 3)) > 0.9
    assert folder == tmp_path / "classifier_whole" and not list(tmp_path.glob(".*"))


def test_a_body_in_four_bits(bases, data, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="pip install -r requirements-4bit.txt")
    argv = flags(base=bases / "bert", lora_name="small", out_dir=tmp_path, device="cpu")
    learn = flags(data_path=data[0], val_path=data[1], **SMALL)
    path = train_classifier([*argv, *learn, "--load_in_4bit"])
    assert read_lora(path)[1].metrics["val"]["last"]["accuracy"] > 0.95
    assert "Linears in NF4" in capsys.readouterr().out
    train_classifier([*argv, *flags(predict=data[0])])
    said = capsys.readouterr()
    assert "Linears in NF4" in said.err, "as it was trained"
    assert share_right(answers_in(said.out), reviews(160, 0)) > 0.95


def test_weights_that_the_base_lacks_learn_too(bases, data, tmp_path, capsys):
    argv = flags(base=bases / "unpooled", lora_name="x", out_dir=tmp_path, device="cpu")
    learn = flags(data_path=data[0], val_path=data[1], **SMALL | {"epochs": 9})
    path = train_classifier([*argv, *learn])
    assert "bert.pooler.dense.weight" in head_of(read_lora(path)[0])
    capsys.readouterr()
    train_classifier([*argv, *flags(predict=data[1], seed=5)])
    right = share_right(answers_in(capsys.readouterr().out), reviews(80, 1))
    assert right == read_lora(path)[1].metrics["val"]["last"]["accuracy"] > 0.9
    with pytest.raises(UserError, match="--load_in_4bit"):
        train_classifier([*argv, *flags(data_path=data[0], max_seq_len=32), "--load_in_4bit"])


def test_a_row_is_answered_as_the_classifier_was_trained(bases, data, tmp_path):
    """Other texts, another tokenizer and another base are refused; the file knows the length."""
    train, dev = data
    argv = flags(base=bases / "bert", lora_name="x", out_dir=tmp_path, device="cpu")
    learn = [*argv, *flags(data_path=train, **SMALL | {"epochs": 1})]
    pairs = [{**row, "text_pair": "fine"} for row in reviews(9, 4)]
    pairs = write_rows(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(UserError, match="text_pair"):
        train_classifier([*learn, *flags(val_path=pairs)])
    path = train_classifier(learn)
    meta = read_lora(path)[1]
    assert meta.pairs is False and meta.metrics["val"]["last"]["step"] == meta.metrics["step"]
    long = write_rows(tmp_path / "long.jsonl", [{"text": "very good " * 99}])
    train_classifier([*argv, *flags(predict=long)])

    other = shutil.copytree(bases / "bert", tmp_path / "other")
    spelled = (other / "tokenizer.json").read_text().replace('"good"', '"nice"')
    (other / "tokenizer.json").write_text(spelled)
    strange = tmp_path / "strange"
    BertModel(BertConfig(**SIZES)).save_pretrained(strange)
    for words, reason in (
        ({"predict": pairs}, "text_pair"),
        ({"predict": dev, "tokenizer_path": other}, "--tokenizer_path"),
        ({"predict": dev, "tokenizer_path": bases / "bert", "base": strange}, "trained on bert"),
        ({"predict": dev, "bad_rows": "skip"}, "--bad_rows"),
    ):
        with pytest.raises(UserError, match=reason):
            train_classifier([*argv, *flags(**words)])
    tensors = torch.load(path)
    bad_length = {"max_seq_len": None, "options": {"max_seq_len": "x"}}
    for damaged in ({"labels": [["0"], ["1"]]}, {"labels": ["0", "0"]}, bad_length):
        packed = json.dumps(json.loads(bytes(tensors["_meta"].tolist())) | damaged).encode()
        record = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        torch.save(tensors | {"_meta": record}, path)
        with pytest.raises(UserError, match="is no classifier"):
            train_classifier([*argv, *flags(predict=dev)])


def test_a_decision_at_the_end_of_the_text_needs_a_tokenizer_that_ends_it(data, tmp_path):
    """T5 and BART read the class there; T5 keeps ``wo`` out of 4 bits."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, vocab_size=32, eos_token_id=3, decoder_start_token_id=0)
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer = bert_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    learn = flags(base=tmp_path, out_dir=tmp_path / "out", data_path=data[0], val_path=data[1])
    learn += flags(target_modules=("q", "v"), **SMALL | {"epochs": 1})
    assert train_classifier(learn).is_file()
    no_end = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = no_end
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not end a text"):
        train_classifier(learn)


def test_a_decoder_is_a_classifier_too(data, tmp_path, capsys):
    """It decides at its last token that is no padding; no chat takes such a skill."""
    train, dev = data
    base, tokenizer = tmp_path / "base", bert_tokenizer()
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=2, eos_token_id=3)).save_pretrained(base)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"  # it pads with its end
    tokenizer.save_pretrained(base)
    argv = flags(base=base, lora_name="x", out_dir=tmp_path, device="cpu")
    learn = flags(data_path=train, val_path=dev, target_modules="all-linear")
    learn += flags(**SMALL | {"learning_rate": 0.003})
    path = train_classifier([*argv, *learn])
    capsys.readouterr()
    train_classifier([*argv, *flags(predict=dev)])
    right = share_right(answers_in(capsys.readouterr().out), reviews(80, 1))
    assert right == read_lora(path)[1].metrics["val"]["last"]["accuracy"] > 0.8
    chat, meta = load_base(tmp_path / "base")[0], read_lora(path)[1]
    with pytest.raises(UserError, match="is more than a LoRA: _head"):
        adapters_in(chat, path)
    apply_lora(chat, 2)
    save_lora(chat, tmp_path / "again.pth", meta)
    assert head_of(read_lora(tmp_path / "again.pth")[0]) == {}


def test_training_goes_on_from_a_classifiers_own_head(bases, data, tmp_path):
    """Whatever the order of its labels: a rate of nearly nothing leaves it as good as it was."""
    model = open_classifier(bases / "bert", ["1", "0"])
    model.save_pretrained(tmp_path / "base")
    bert_tokenizer().save_pretrained(tmp_path / "base")
    samples = samples_of(reviews(80, 1), ["1", "0"])
    before = score(model, [samples.collate(np.arange(80))], CPU)
    argv = flags(base=tmp_path / "base", data_path=data[0], val_path=data[1], out_dir=tmp_path)
    argv += flags(**SMALL | {"learning_rate": 1e-12, "epochs": 1, "max_steps": 1})
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


@pytest.mark.parametrize(
    "change", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"model_type": "electra"}]
)
def test_a_base_whose_config_is_not_its_own_is_refused(bases, tmp_path, change):
    base = shutil.copytree(bases / "bert", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | change
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json"):
        open_classifier(base, ["a", "b"])


def test_what_a_text_spells_is_no_control_token():
    row = {"text": "the [SEP] film [PAD]", "label": "a"}
    ids = samples_of([row], ["a", "b"]).collate(np.array([0])).inputs["input_ids"][0].tolist()
    assert ids[0] == 2 and ids[-1] == 3 and not {0, 2, 3} & set(ids[1:-1])


def test_positions_that_begin_after_the_padding_leave_less_room():
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES))
    check_row_length(model, 62)
    model(torch.full((1, 62), 5))
    with pytest.raises(UserError, match="64"):
        check_row_length(model, 63)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 63), 5))


def test_runs_of_other_names_keep_apart(bases, data, tmp_path):
    argv = flags(base=bases / "bert", data_path=data[0], out_dir=tmp_path, **SMALL | {"epochs": 1})
    for name in ("v1.1", "v1.2"):
        train_classifier([*argv, "--full", "--lora_name", name])
    names = {path.stem for path in (tmp_path / "metrics").glob("*.jsonl")}
    assert names == {"classifier_v1.1", "classifier_v1.2"}
    itself = flags(base=tmp_path / "classifier_v1.1", data_path=data[0], out_dir=tmp_path, **SMALL)
    with pytest.raises(UserError, match=r"classifier_v1\.1 is --base itself.*--lora_name"):
        train_classifier([*itself, "--full", "--lora_name", "v1.1"])


def test_other_validation_rows_are_another_run(bases, data, tmp_path):
    dev = shutil.copy(data[1], tmp_path / "dev.jsonl")
    argv = flags(base=bases / "bert", data_path=data[0], val_path=dev, out_dir=tmp_path / "out")
    argv += flags(**SMALL | {"max_steps": 1})
    train_classifier(argv)
    write_rows(tmp_path / "dev.jsonl", reviews(9, 7))
    with pytest.raises(UserError, match="file 1 of val_path"):
        train_classifier([*argv, "--resume"])


@pytest.mark.parametrize(
    "words, reason",
    [
        ("--base BASE --data_path TRAIN --full --rank 4", "leave out --r"),
        ("--base BASE --data_path TRAIN --val_path NEW", r"new\.jsonl:1: .label. 7"),
        ("--base none --data_path TRAIN", "base none"),
        ("--base BASE --data_path ONE --max_seq_len 9", "all rows have the label|holds out all"),
        ("", "--base"),
        ("--base BASE", "--data_path.*--predict"),
        ("--base BASE --data_path TRAIN --full --load_in_4bit", "--full trains all weights"),
        ("--base BASE --predict TRAIN --full", "leave out --full"),
        ("--base TRAIN --data_path TRAIN", "cannot be read|is neither a folder"),
        ("--base BASE --data_path TRAIN --max_seq_len 65", "context of 64"),
        ("--base BASE --data_path TRAIN --max_seq_len 9 --target_modules wq", "wq"),
        ("--base BASE --data_path TRAIN --warmup_ratio 1", "warmup_ratio=1.0"),
        ("--base BASE --data_path TRAIN --decay_ratio 0", "decay_ratio=0.0"),
    ],
)
def test_a_wrong_flag_is_named(bases, data, tmp_path, words, reason):
    places = {"BASE": bases / "bert", "TRAIN": data[0]}
    for name, label in (("one", 1), ("new", 7)):
        rows = [{"text": "the film", "label": label}]
        places[name.upper()] = write_rows(tmp_path / f"{name}.jsonl", rows)
    argv = [str(places.get(word, word)) for word in words.split()]
    with pytest.raises(UserError, match=reason):
        train_classifier([*argv, *flags(out_dir=tmp_path, device="cpu")])
    assert not (tmp_path / "lora").exists()
