"""Teach a pretrained model to tell texts apart: python scripts/train_lora_classifier.py --base DIR --data_path a.tsv"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError, run
from core.files import sha256_file
from core.options import option, parse, require
from core.paths import classifier_dir, head_path, lora_path, lora_paths, skill_name
from model.lora_config import LoRAConfig
from trainer.options import TrainOptions


@dataclass
class Options(LoRAConfig, TrainOptions):
    """Train LoRA and a new head on labelled texts or pairs of texts; the scores are of --val_path."""

    base: Path | None = option(None, "pretrained model: a Hugging Face folder or owner/model")
    data_path: tuple[Path, ...] = option((), "rows with text, label and perhaps text_pair: .jsonl, .json or .tsv")
    val_path: tuple[Path, ...] = option((), "rows to score (default: --val_ratio of the training rows)")
    lora_name: str = option("classifier", "name of the skill; it names the files")
    full: bool = option(False, "train all weights instead of LoRA, into out/classifiers/<name>")
    load_in_4bit: bool = option(False, "freeze the body in 4 bits (QLoRA; needs requirements-4bit.txt)")
    predict: Path | None = option(None, "train nothing: print the label of each row of this file, with its probability")
    rank: int = option(8, "rank of the update")
    alpha: float | None = option(16.0, "the update is scaled by alpha / rank")
    target_modules: tuple[str, ...] = option(
        ("query", "value"), "square, all-linear, names or name endings of Linear layers, or one regular expression"
    )
    epochs: int = option(3, "passes over the data")
    batch_size: int = option(32, "rows of a micro-batch")
    learning_rate: float = option(1e-3, "peak learning rate")
    warmup_ratio: float = option(0.06, "share of the steps in which the rate rises")
    decay_ratio: float = option(1.0, "share of the steps after the warm-up in which the rate falls to 0")
    weight_decay: float = option(0.01, "decoupled weight decay of matrices (not of norms)")
    max_seq_len: int = option(128, "tokens of a row")
    val_ratio: float = option(0.1, "share of rows held out where there is no --val_path")

    def __post_init__(self):
        TrainOptions.__post_init__(self)
        LoRAConfig.__post_init__(self)
        skill_name(self.lora_name)
        require(self.base is not None, "name a pretrained model with --base")
        require(bool(self.data_path) != bool(self.predict), "name rows with --data_path, or a file with --predict")
        require(not (self.full and self.predict), "--full makes a folder that transformers itself can load and ask")
        require(not (self.full and self.load_in_4bit), "--full trains all weights, which 4 bits cannot: choose one")


def main(argv: list[str] | None = None) -> Path | None:
    options = parse(Options, argv)
    from dataset.batches import validation_batches
    from dataset.labelled import LabelledSamples, labels_of, read_labelled, split_labelled
    from dataset.tokenizer import read_tokenizer
    from model.classifier import class_loss_sum, head_state, open_classifier, save_classifier, save_head
    from model.LMConfig import check_length
    from model.lora_targets import table_of
    from model.model_lora import apply_lora, base_fingerprint, save_lora
    from model.quantized import quantize
    from scripts.wiring import run_record, train_and_save
    from trainer.evaluation import score
    from trainer.runtime import Runtime

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    if options.predict:
        return predict(options, runtime)
    rows = read_labelled(options.data_path, options.bad_rows)
    if options.val_path:
        held_out = read_labelled(options.val_path, options.bad_rows)
    else:
        rows, held_out = split_labelled(rows, options.val_ratio)
    labels = labels_of(rows)
    tokenizer = read_tokenizer(options.tokenizer_path or options.base)
    train, val = (LabelledSamples(part, labels, tokenizer, options.max_seq_len) for part in (rows, held_out))
    print(f"training: {train.describe()}\nheld out: {val.describe()}\nlabels: {', '.join(labels)}")
    model = open_classifier(options.base, labels).to(runtime.device)
    print(f"base: {options.base}; trained whole: {', '.join(head_state(model))}")
    body = model.base_model
    check_length(model.config, options.max_seq_len)
    model.config.pad_token_id = train.pad_id
    fingerprint = base_fingerprint(body)
    path = lora_path(options.out_dir, options.lora_name, model.config.hidden_size)
    if options.full:
        path = classifier_dir(options.out_dir, options.lora_name)
        model.requires_grad_(True)
    else:
        new = [parameter for parameter in body.parameters() if parameter.requires_grad]
        if options.load_in_4bit:
            require(
                not new, f"--base {options.base} lacks weights, which 4 bits cannot learn: leave out --load_in_4bit"
            )
            quantize(body, runtime.dtype)
        apply_lora(body, **{field.name: getattr(options, field.name) for field in fields(LoRAConfig)})
        for parameter in new:
            parameter.requires_grad_(True)
        print(table_of(body))
    memory = {}
    batches = validation_batches(val, options.batch_size, max_tokens=sys.maxsize)

    def validate():
        scores = score(model, batches, runtime)
        memory["val"] = asdict(scores) if scores.targets else {}
        return scores

    record = run_record("classifier", options, tokenizer, {"file": options.base.name, "fingerprint": fingerprint})
    record |= {"labels": labels}

    def on_save(step: int) -> None:
        if options.full:
            save_classifier(model, tokenizer, path)
        else:
            save_head(model, head_path(path))
            head = sha256_file(head_path(path))
            save_lora(body, path, {**record, "head": head, "metrics": {"step": step, **memory}})

    callbacks = {"on_save": on_save, "validate": validate, "memory": memory, "loss_sum": class_loss_sum}
    train_and_save(model, train, options, runtime, path, record, **callbacks)
    return path


def predict(options: Options, runtime) -> None:
    """Print ``{"label", "probability"}`` for each row of --predict, in its order; rows need no label."""
    import numpy as np
    import torch

    from dataset.labelled import LabelledSamples, clean_unlabelled, read_labelled
    from dataset.tokenizer import read_tokenizer
    from model.classifier import load_head, open_classifier
    from model.model_lora import attach_lora, read_lora
    from model.quantized import quantize

    found = lora_paths(options.out_dir, options.lora_name)
    if not found:
        missing = lora_path(options.out_dir, options.lora_name, "<dim>")
        raise UserError(f"there is no skill file {missing}; train it with --data_path")
    path = found[-1]
    head, (_, meta) = head_path(path), read_lora(path)
    labels = meta.get("labels")
    if not isinstance(labels, list):
        raise UserError(f"{path} is no classifier's skill: it names no labels")
    if not head.is_file() or sha256_file(head) != meta.get("head"):
        raise UserError(f"{head} is not the head that {path} was trained with; keep the two together or train again")
    rows = read_labelled((options.predict,), options.bad_rows, clean_unlabelled)
    tokenizer = read_tokenizer(options.tokenizer_path or options.base)
    samples = LabelledSamples(rows, labels, tokenizer, options.max_seq_len)
    model = open_classifier(options.base, labels).to(runtime.device).eval()
    model.config.pad_token_id = samples.pad_id
    load_head(model, head)
    with redirect_stdout(sys.stderr):  # what is printed below can be piped
        if options.load_in_4bit:
            quantize(model.base_model, runtime.dtype)
        attach_lora(model.base_model, path)
    for index in range(len(samples)):
        batch = runtime.move(samples.collate(np.array([index])))
        with torch.no_grad(), runtime.autocast():
            probabilities = model(**batch.inputs).logits[0].float().softmax(-1)
        best = int(probabilities.argmax())
        answer = {"label": labels[best], "probability": round(float(probabilities[best]), 4)}
        print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
