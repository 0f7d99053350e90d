"""What the training doors share: their data, validation, and the record a run leaves in its file."""

from dataclasses import asdict, fields
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from core.files import sha256_file
from core.paths import cache_dir
from dataset.batches import Batches, PretrainDataset, Samples, validation_batches
from dataset.tokenizer import tokenizer_fingerprint
from model.loss import nats_of
from trainer.evaluation import Metrics, evaluate
from trainer.options import TrainOptions
from trainer.runtime import Runtime


def read_data(
    kind: type[PretrainDataset], options: TrainOptions, tokenizer: PreTrainedTokenizerBase
) -> PretrainDataset:
    """The data of ``--data_path``, described in print."""
    data = kind(
        options.data_path,
        tokenizer,
        options.max_seq_len,
        cache=cache_dir(options.out_dir),
        val_ratio=options.val_ratio,
        bad_rows=options.bad_rows,
    )
    print(f"{', '.join(path.name for path in options.data_path)}: {data.train.describe()}")
    print(f"  held out: {data.val.describe()}")
    return data


def batches_of(samples: Samples, options: TrainOptions) -> Batches:
    return Batches(samples, options.batch_size, options.accumulation_steps, options.seed, options.num_workers)


class Validation:
    """Loss and bits per byte of ``model`` on about ``val_tokens`` held-out tokens, the same ones at each call."""

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        tokenizer: PreTrainedTokenizerBase,
        options: TrainOptions,
        runtime: Runtime,
    ):
        self.model, self.runtime = model, runtime
        self.batches = validation_batches(samples, options.batch_size, options.val_tokens)
        self.nats = nats_of(set(tokenizer.all_special_ids))
        self.first: Metrics | None = None
        self.last: Metrics | None = None

    def __call__(self) -> Metrics:
        self.last = evaluate(self.model, self.batches, self.runtime, loss_sum=self.nats)
        self.first = self.first or self.last
        return self.last

    def record(self) -> dict:
        """The first and the last result, empty when nothing was held out."""
        return {"first": asdict(self.first), "last": asdict(self.last)} if self.last and self.last.targets else {}

    def __str__(self) -> str:
        return f"before {self.first}; after {self.last}"


def run_record(stage: str, options: TrainOptions, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What a file says of the run that made it; paths are cut to file names."""

    def cut(value: object) -> object:
        if isinstance(value, Path):
            return value.name
        return [cut(item) for item in value] if isinstance(value, tuple) else value

    return {
        "stage": stage,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": [
            {"file": path.name, "sha256": sha256_file(path, cache_dir(options.out_dir))} for path in options.data_path
        ],
        "options": {field.name: cut(getattr(options, field.name)) for field in fields(options)},
    }


def starts_clean(path: Path) -> Path:
    """``path``, once it was said that a re-run replaces what an earlier run left there."""
    if path.exists():
        print(f"starting clean: {path} of an earlier run will be replaced")
    return path
