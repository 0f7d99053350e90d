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
    print(f"data: {data.train.describe()}\nheld out: {data.val.describe()}")
    return data


def batches_of(samples: Samples, options: TrainOptions) -> Batches:
    return Batches(samples, options.batch_size, options.accumulation_steps, options.seed, options.num_workers)


class Validation:
    """Loss and bits per byte of ``model`` on the first ``val_tokens`` held-out tokens, the same ones at each call."""

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
        self.last: Metrics | None = None

    def __call__(self) -> Metrics:
        self.last = evaluate(self.model, self.batches, self.runtime, loss_sum=self.nats)
        return self.last

    def record(self, step: int) -> dict:
        return {"step": step} | (
            {f"val_{name}": value for name, value in asdict(self.last).items()} if self.last else {}
        )


def run_record(stage: str, options: object, tokenizer: PreTrainedTokenizerBase, data_path: tuple[Path, ...]) -> dict:
    """What a file says of the run that made it; paths are cut to file names."""

    def cut(value: object) -> object:
        if isinstance(value, Path):
            return value.name
        return [cut(item) for item in value] if isinstance(value, tuple) else value

    return {
        "stage": stage,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": {path.name: sha256_file(path) for path in data_path},
        "options": {field.name: cut(getattr(options, field.name)) for field in fields(options)},
    }


def starts_clean(*outputs: Path) -> None:
    """Say that a re-run replaces what an earlier run left."""
    for path in outputs:
        if path.exists():
            print(f"starting clean: {path} of an earlier run will be replaced")
