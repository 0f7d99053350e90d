"""Teach a pretrained model to tell texts apart: python scripts/train_lora_classifier.py --base DIR
--data_path a.tsv
"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError, run
from core.options import option, parse, require
from core.paths import classifier_dir, lora_path, skill_name
from model.lora.config import LoRAConfig
from trainer.options import TrainOptions

OF_PREDICTION = (
    "base",
    "lora_name",
    "predict",
    "out_dir",
    "device",
    "dtype",
    "tokenizer_path",
    "seed",
)


@dataclass
class Options(LoRAConfig, TrainOptions):
    """Train LoRA and a new head on labelled texts or pairs of texts; the scores are of
    --val_path.
    """

    base: Path | None = option(
        None, "pretrained model: a Hugging Face folder or owner/model", group="most used"
    )
    data_path: tuple[Path, ...] = option(
        (),
        "rows with text, label and perhaps text_pair: .jsonl, .json or .tsv",
        group="most used",
    )
    lora_name: str = option(
        "classifier", "name of the skill; it names the files", group="most used"
    )
    predict: Path | None = option(
        None,
        "train nothing: print the label of each row of this file, with its probability",
        group="most used",
    )
    val_path: tuple[Path, ...] = option(
        (), "rows to score (default: val_ratio of the training rows)", group="data"
    )
    full: bool = option(
        False,
        "train all weights instead of LoRA, into the folder out/classifier_<name>",
        group="skill",
    )
    load_in_4bit: bool = option(
        False, "freeze the body in 4 bits (QLoRA; needs requirements-4bit.txt)", group="device"
    )
    rank: int = 8
    alpha: float | None = option(16.0, "the update is scaled by alpha / rank")
    target_modules: tuple[str, ...] = ("query", "value")
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float | None = option(
        None, "peak learning rate (default: 1e-3, with --full 5e-5)"
    )
    warmup_ratio: float = 0.06
    decay_ratio: float = 1.0
    weight_decay: float = 0.01
    max_seq_len: int = 128
    val_ratio: float = option(0.1, "share of rows held out where there is no --val_path")
    val_tokens: int = 10**9

    def __post_init__(self):
        defaults = {field.name: field.default for field in fields(self)}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        of_lora = [field.name for field in fields(LoRAConfig) if field.name in given]
        of_training = [name for name in given if name not in OF_PREDICTION]
        if self.learning_rate is None:
            self.learning_rate = 5e-5 if self.full else 1e-3
        super().__post_init__()
        skill_name(self.lora_name)
        require(self.base is not None, "name a pretrained model with --base")
        require(
            bool(self.data_path) != bool(self.predict),
            "name rows with --data_path, or a file with --predict",
        )
        require(
            not (self.full and self.load_in_4bit),
            "--full trains all weights, which 4 bits cannot: choose one",
        )
        require(
            not (self.full and of_lora),
            f"--full trains no LoRA: leave out --{', --'.join(of_lora)}",
        )
        wrong = f"--predict reads rows as the skill was trained to: leave out --{', --'.join(of_training)}"
        require(not (self.predict and of_training), wrong)


def main(argv: list[str] | None = None) -> Path | None:
    options = parse(Options, argv)
    from trainer.runtime import Runtime

    runtime = Runtime.start(options.device, options.dtype, options.seed)
    return predict(options, runtime) if options.predict else train(options, runtime)


def train(options: Options, runtime) -> Path:
    """Train a skill, or with --full a whole model, on labelled rows; returns its file or folder."""
    from dataset.batches import validation_batches
    from dataset.labelled import (
        LabelledSamples,
        clean_labelled,
        has_pairs,
        labels_of,
        read_labelled,
        split_labelled,
    )
    from dataset.tokenizer import reading_fingerprint
    from model.classifier import (
        HEAD,
        check_row_length,
        class_loss_sum,
        head_state,
        open_classifier,
    )
    from model.huggingface import save_folder
    from model.lora.skill_file import SkillMeta, base_fingerprint
    from model.lora.targets import table_of
    from model.model_lora import apply_lora, save_lora
    from model.quantized import quantize
    from trainer.evaluation import score
    from trainer.stage import run_record, train_and_save

    rows, held_out = read_labelled(options.data_path, options.bad_rows), []
    labels = labels_of(rows)
    if options.val_path:
        held_out = read_labelled(
            options.val_path, options.bad_rows, partial(clean_labelled, labels=labels)
        )
    elif options.val_ratio:
        rows, held_out = split_labelled(rows, options.val_ratio)
    model = open_classifier(options.base, labels).to(runtime.device)
    body, labels = model.base_model, list(model.config.id2label.values())
    check_row_length(model, options.max_seq_len)
    tokenizer = opened_tokenizer(options, model)
    pairs = has_pairs(rows)
    samples, val = (
        LabelledSamples(part, labels, tokenizer, options.max_seq_len, pairs=pairs)
        for part in (rows, held_out)
    )
    print(
        f"training: {samples.describe()}\nheld out: {val.describe()}\nlabels: {', '.join(labels)}"
    )
    print(f"base: {options.base}")
    origin = {"file": options.base.name, "fingerprint": base_fingerprint(body)}
    path = lora_path(options.out_dir, options.lora_name, model.config.hidden_size)
    if options.full:
        path = classifier_dir(options.out_dir, options.lora_name)
        require(
            path.resolve() != options.base.resolve(),
            f"{path} is --base itself; choose another --lora_name",
        )
        model.requires_grad_(True)
    else:
        new = [parameter for parameter in body.parameters() if parameter.requires_grad]
        if options.load_in_4bit:
            require(
                not new,
                f"--base {options.base} lacks weights, which 4 bits cannot learn; drop --load_in_4bit",
            )
            quantize(body, runtime.dtype)
        apply_lora(
            body, **{field.name: getattr(options, field.name) for field in fields(LoRAConfig)}
        )
        for parameter in new:
            parameter.requires_grad_(True)
        print(f"{table_of(body)}\ntrained whole: {', '.join(head_state(model))}")
    memory = {}
    batches = validation_batches(val, options.batch_size, options.val_tokens)

    def validate():
        scores = score(model, batches, runtime)
        memory["val"] = asdict(scores) if scores.targets else {}
        return scores

    record = run_record(
        SkillMeta,
        "classifier",
        options,
        tokenizer,
        base=origin,
        labels=labels,
        pairs=pairs,
        max_seq_len=options.max_seq_len,
        load_in_4bit=options.load_in_4bit,
    )
    record = replace(record, tokenizer=reading_fingerprint(tokenizer))

    def on_save(step: int) -> None:
        if memory.get("val"):
            memory["val"].setdefault(
                "step", step
            )  # a stop in between saves later weights than were scored
        if options.full:
            save_folder(model, tokenizer, path)
        else:
            meta = replace(record, metrics={"step": step, **memory})
            head = {HEAD + name: tensor for name, tensor in head_state(model).items()}
            save_lora(body, path, meta, head)

    callbacks = {
        "on_save": on_save,
        "validate": validate,
        "memory": memory,
        "loss_sum": class_loss_sum,
    }
    train_and_save(model, samples, options, runtime, path, record, **callbacks)
    return path


def predict(options: Options, runtime) -> None:
    """Print ``{"label", "probability"}`` for each row of --predict, in its order; rows need no
    label.

    Length of the rows and 4 bits are those of the training.
    """
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
    skill = tensors, meta = read_lora(path)
    labels, max_seq_len = meta.labels, meta.max_seq_len
    if not head_of(tensors) or not are_names(labels) or type(max_seq_len) is not int:
        raise UserError(
            f"{path} is no classifier's skill: it has no head, labels and length of rows"
        )
    with redirect_stdout(sys.stderr):  # what is printed below can be piped
        rows = read_labelled((options.predict,), "refuse", clean_unlabelled)
        model = open_classifier(options.base, labels).to(runtime.device).eval()
        adapters_in(model.base_model, path, skill, with_extra=True)
        tokenizer = opened_tokenizer(options, model)
        if reading_fingerprint(tokenizer) != meta.tokenizer:
            raise UserError(
                f"{path} was trained with another tokenizer; name that one with --tokenizer_path"
            )
        samples = LabelledSamples(rows, labels, tokenizer, max_seq_len, pairs=bool(meta.pairs))
        load_head(model, tensors, path)
        if meta.load_in_4bit:
            quantize(model.base_model, runtime.dtype)
        attach_lora(model.base_model, path, with_extra=True)
    for index in range(len(samples)):
        batch = runtime.move(samples.collate(np.array([index])))
        with torch.no_grad(), runtime.autocast():
            probabilities = model(**batch.inputs).logits[0].float().softmax(-1)
        best = int(probabilities.argmax())
        print(
            json.dumps({"label": labels[best], "probability": round(float(probabilities[best]), 4)})
        )


def are_names(labels) -> bool:
    """Whether these are two or more different labels, as a skill file holds them."""
    are_texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    return are_texts and len(set(labels)) == len(labels) >= 2


def opened_tokenizer(options: Options, model):
    """The base's, or that of --tokenizer_path; what it pads with, the model knows. Raises
    ``UserError``.
    """
    from dataset.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(options.tokenizer_path or options.base)
    if len(tokenizer) > (size := model.get_input_embeddings().num_embeddings):
        raise UserError(
            f"--base {options.base} knows {size} tokens, the tokenizer has {len(tokenizer)}: it is another's"
        )
    config = model.config
    if config.is_encoder_decoder and config.eos_token_id not in tokenizer("a").input_ids:
        raise UserError(
            f"the tokenizer of {options.base} does not end a text, where this kind of model decides"
        )
    if tokenizer.pad_token_id is None:
        require(
            tokenizer.eos_token_id is not None,
            f"the tokenizer of {options.base} has neither padding nor an end",
        )
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


if __name__ == "__main__":
    run(main, keep_working=True)
