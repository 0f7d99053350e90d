"""Teach a model to classify: python scripts/train_lora_classifier.py --base DIR --data_path FILE"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError, run
from core.options import option, parse, require
from core.paths import classifier_dir, lora_path, skill_name
from model.lora.config import LoRAConfig
from trainer.options import TrainOptions

OF_PREDICTION = {"base", "lora_name", "predict", "out_dir"}
OF_PREDICTION |= {"device", "dtype", "tokenizer_path", "seed"}
ROWS_HELP = "rows with text, label and perhaps text_pair, such as .jsonl, .csv or .tsv"
PREDICT_HELP = "train nothing: print label and probability of this file's rows"


@dataclass
class Options(LoRAConfig, TrainOptions):
    """Train LoRA and a new head on labelled texts or pairs of texts, and score held-out rows."""

    base: Path | None = option(None, "Hugging Face folder or owner/model", group="most used")
    data_path: tuple[Path, ...] = option((), ROWS_HELP, group="most used")
    lora_name: str = option("classifier", "name of the skill and its files", group="most used")
    predict: Path | None = option(None, PREDICT_HELP, group="most used")
    val_path: tuple[Path, ...] = option((), "rows to score (default: val_ratio)", group="data")
    full: bool = option(False, "train all weights, into out/classifier_<name>", group="skill")
    load_in_4bit: bool = option(False, "QLoRA; needs requirements-4bit.txt", group="device")
    rank: int = 8
    alpha: float | None = option(16.0, "the update is scaled by alpha / rank")
    target_modules: tuple[str, ...] = ("query", "value")
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float | None = option(None, "peak rate (default: 1e-3, with --full 5e-5)")
    warmup_ratio: float = 0.06
    decay_ratio: float = 1.0
    weight_decay: float = 0.01
    max_seq_len: int = 128
    val_ratio: float = option(0.1, "share of rows held out where there is no --val_path")
    val_tokens: int = 10**9

    def __post_init__(self):
        given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        of_lora = [each.name for each in fields(LoRAConfig) if each.name in given]
        of_training = [name for name in given if name not in OF_PREDICTION]
        if self.learning_rate is None:
            self.learning_rate = 5e-5 if self.full else 1e-3
        super().__post_init__()
        skill_name(self.lora_name)
        require(self.base is not None, "name a pretrained model with --base")
        keeps = self.control_text == "keep"
        require(keeps, "texts are classified as they are: leave out --control_text")
        one_task = bool(self.data_path) != bool(self.predict)
        require(one_task, "name rows with --data_path, or a file with --predict")
        both = self.full and self.load_in_4bit
        require(not both, "--full trains all weights, which 4 bits cannot: choose one")
        wrong = f"--full trains no LoRA: leave out --{', --'.join(of_lora)}"
        require(not (self.full and of_lora), wrong)
        wrong = f"--predict reads rows as in training: leave out --{', --'.join(of_training)}"
        require(not (self.predict and of_training), wrong)


def main(argv: list[str] | None = None) -> Path | None:
    options = parse(Options, argv)
    from trainer.runtime import Runtime

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    return predict(options, runtime) if options.predict else train(options, runtime)


def train(options: Options, runtime) -> Path:
    """Train a skill, or with --full a whole model, on labelled rows; return its file or folder."""
    from dataset.batches import validation_batches
    from dataset.labelled import LabelledSamples, has_pairs
    from dataset.tokenizer import reading_fingerprint
    from model import classifier
    from model.huggingface import save_folder
    from model.lora.skill_file import SkillMeta, base_fingerprint
    from model.model_lora import save_lora
    from trainer.metrics import Validation
    from trainer.scores import score
    from trainer.stage import run_facts, run_stage

    rows, held_out, labels = labelled_rows(options)
    model = classifier.open_classifier(options.base, labels).to(runtime.device)
    body, labels = model.base_model, list(model.config.id2label.values())
    classifier.check_row_length(model, options.max_seq_len)
    tokenizer, pairs = opened_tokenizer(options, model), has_pairs(rows)
    length = options.max_seq_len
    samples = LabelledSamples(rows, labels, tokenizer, length, pairs=pairs)
    val = LabelledSamples(held_out, labels, tokenizer, length, pairs=pairs)
    print(f"training: {samples.describe()}\nheld out: {val.describe()}")
    print(f"labels: {', '.join(labels)}\nbase: {options.base}")
    facts = run_facts("classifier", options, tokenizer)
    facts["base"] = {"file": options.base.name, "fingerprint": base_fingerprint(body)}
    facts["tokenizer"] = reading_fingerprint(tokenizer)
    asked = {"max_seq_len": length, "load_in_4bit": options.load_in_4bit}
    path = choose_trained(options, model, runtime)
    batches = validation_batches(val, options.batch_size, options.val_tokens)

    def write(record: SkillMeta) -> None:
        if options.full:
            save_folder(model, tokenizer, path)
        else:
            save_lora(body, path, record, classifier.head_tensors(model))

    record = SkillMeta(**facts, **asked, labels=labels, pairs=pairs)
    plugged = {"validation": Validation({"val": partial(score, model, batches, runtime)})}
    plugged["loss_sum"] = classifier.class_loss_sum
    result = {"path": path, "record": record, "write": write}
    return run_stage(model, samples, options, runtime, **result, **plugged)


def labelled_rows(options: Options) -> tuple[list[dict], list[dict], list[str]]:
    """The rows to train on, those to score, and the labels."""
    from dataset.labelled import clean_labelled, labels_of, read_labelled, split_labelled

    rows, held_out = read_labelled(options.data_path, options.bad_rows), []
    labels = labels_of(rows)
    if options.val_path:
        clean = partial(clean_labelled, labels=labels)
        held_out = read_labelled(options.val_path, options.bad_rows, clean)
    elif options.val_ratio:
        rows, held_out = split_labelled(rows, options.val_ratio)
    return rows, held_out, labels


def choose_trained(options: Options, model, runtime) -> Path:
    """Mark what trains, all of the model or a LoRA and the head; return where it will be saved."""
    from model.classifier import head_state
    from model.lora.targets import table_of
    from model.model_lora import apply_lora
    from model.quantized import quantize

    if options.full:
        path = classifier_dir(options.out_dir, options.lora_name)
        is_base = path.resolve() == options.base.resolve()
        require(not is_base, f"{path} is --base itself; choose another --lora_name")
        model.requires_grad_(True)
        return path
    body = model.base_model
    new = [parameter for parameter in body.parameters() if parameter.requires_grad]
    if options.load_in_4bit:
        lacking = f"--base {options.base} lacks weights, which 4 bits cannot learn"
        require(not new, f"{lacking}; drop --load_in_4bit")
        quantize(body, runtime.dtype)
    apply_lora(body, config=options)
    for parameter in new:
        parameter.requires_grad_(True)
    print(f"{table_of(body)}\ntrained whole: {', '.join(head_state(model))}")
    return lora_path(options.out_dir, options.lora_name, model.config.hidden_size)


def predict(options: Options, runtime) -> None:
    """Print ``{"label", "probability"}`` of each row, cut as in training; rows need no label."""
    import numpy as np
    import torch

    from dataset.labelled import LabelledSamples, clean_unlabelled, read_labelled
    from dataset.tokenizer import reading_fingerprint
    from model.classifier import head_of, load_head, open_classifier, read_config
    from model.lora.skill_file import adapters_in, read_lora
    from model.model_lora import attach_lora
    from model.quantized import quantize

    path = lora_path(options.out_dir, options.lora_name, read_config(options.base).hidden_size)
    if not path.is_file():
        raise UserError(f"there is no skill file {path}; train it with --data_path, without --full")
    tensors, meta = read_lora(path)
    labels, length, pairs = meta.labels, meta.max_seq_len, bool(meta.pairs)
    are_names = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    differ = are_names and len(set(labels)) == len(labels) >= 2
    if not (differ and head_of(tensors) and isinstance(length, int)):
        raise UserError(f"{path} is no classifier's skill: it lacks a head, labels or row length")
    with redirect_stdout(sys.stderr):  # what is printed below can be piped
        rows = read_labelled((options.predict,), "refuse", clean_unlabelled)
        model = open_classifier(options.base, labels).to(runtime.device).eval()
        adapters_in(model.base_model, path, (tensors, meta), with_extra=True)
        tokenizer = opened_tokenizer(options, model)
        if reading_fingerprint(tokenizer) != meta.tokenizer:
            raise UserError(f"{path} was trained with another tokenizer; name it: --tokenizer_path")
        samples = LabelledSamples(rows, labels, tokenizer, length, pairs=pairs)
        load_head(model, tensors, path)
        if meta.load_in_4bit:
            quantize(model.base_model, runtime.dtype)
        attach_lora(model.base_model, path, with_extra=True)
    for index in range(len(samples)):
        batch = runtime.move(samples.collate(np.array([index])))
        with torch.no_grad(), runtime.autocast():
            probabilities = model(**batch.inputs).logits[0].float().softmax(-1)
        best = int(probabilities.argmax())
        answer = {"label": labels[best], "probability": round(float(probabilities[best]), 4)}
        print(json.dumps(answer))


def opened_tokenizer(options: Options, model):
    """The tokenizer named, or the base's, which the model must fit; sets the model's padding."""
    from dataset.tokenizer import read_tokenizer

    tokenizer, config = read_tokenizer(options.tokenizer_path or options.base), model.config
    size = model.get_input_embeddings().num_embeddings
    wrong = f"--base {options.base} knows {size} tokens, but the tokenizer has {len(tokenizer)}"
    require(len(tokenizer) <= size, wrong)
    # Encoder-decoders classify by the end of the text.
    ends = not config.is_encoder_decoder or config.eos_token_id in tokenizer("a").input_ids
    require(ends, f"the tokenizer of {options.base} does not end a text, where this model decides")
    if tokenizer.pad_token_id is None:
        wrong = f"the tokenizer of {options.base} has neither a padding nor an end token"
        require(tokenizer.eos_token_id is not None, wrong)
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


if __name__ == "__main__":
    run(main, keep_working=True)
