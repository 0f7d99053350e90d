"""Small real parts that several test files share."""

import copy
import inspect
import json
import logging
import os
import shutil
import signal
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from core.threads import limit_spinning

limit_spinning()  # before torch is imported

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from benchmarks.seeded_model import fill
from core.paths import REPOSITORY, TOKENIZER_DIR, bundled_data
from dataset.batches import IGNORED, KINDS, Batch
from dataset.tokenizer import load_tokenizer
from model.LMConfig import LMConfig
from model.lora.layer import lora_parameters
from model.model import MiniMindLM
from model.model_lora import remove_lora
from trainer import keeping
from trainer.checkpoints import RunStates
from trainer.loop import causal_loss_sum, train
from trainer.metrics import Metrics, Validation
from trainer.optimizer import param_groups
from trainer.options import TrainOptions
from trainer.run import Run, Summary
from trainer.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)

# run_tests.py sets it on a build server: a test that lacks its judge may be skipped elsewhere only.
if os.environ.get("REQUIRE_ORACLES"):
    assert all(map(find_spec, ("peft", "bitsandbytes", "gguf", "xllamacpp"))), "a judge is missing"


class DeprecatedUse(logging.Handler):
    """Raises where transformers logs that our code, not another package, uses what will go."""

    def emit(self, record: logging.LogRecord) -> None:
        frame, between = inspect.currentframe(), {__name__, "logging", "torch", "transformers"}
        while frame.f_globals["__name__"].partition(".")[0] in between:
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(REPOSITORY) and "site-packages" not in path.parts
        if is_ours and "deprecat" in record.getMessage():
            raise AssertionError(record.getMessage())


library_logging.get_logger("transformers").addHandler(DeprecatedUse())

# The tests send these; a shell's background job would ignore Ctrl-C, and nohup the end of the
# terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _compiler_missing() -> bool:
    names = [os.environ.get("CXX"), *(("cl",) if os.name == "nt" else ("g++", "clang++", "c++"))]
    found = any(name and shutil.which(name) for name in names)
    return not found or not Path(sysconfig.get_path("include"), "Python.h").is_file()


needs_compiler = pytest.mark.skipif(
    _compiler_missing(),
    reason="torch.compile needs a C++ compiler and Python.h (g++, python3-dev; Xcode; MSVC)",
)


@pytest.fixture
def tiny_model() -> MiniMindLM:
    """A two-layer model with fixed random weights, in eval mode."""
    torch.manual_seed(0)
    config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, max_seq_len=128)
    return MiniMindLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The shipped tokenizer."""
    return load_tokenizer(TOKENIZER_DIR)


@dataclass(frozen=True)
class Trained:
    """What the doors made of small data; read only, shared by the whole session."""

    out: Path
    texts: Path
    chats: Path
    general: Path  # chats that ask nothing of what ``chats`` ask

    def flags(self, **more: object) -> list[str]:
        return flags(out_dir=self.out, **more)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """``path``, as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def flags(**values: object) -> list[str]:
    """``--name value`` words; a tuple gives several values."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


# The files of ``Trained``, with the bundled ones whose first rows they are.
BUNDLED = {"texts": ("pretrain_mini.jsonl", 60), "chats": ("sft_mini/talk.jsonl", 60)}
BUNDLED["general"] = ("lora_medical.jsonl", 24)
SMALL = {"max_seq_len": 64, "batch_size": 8, "max_steps": 4, "device": "cpu", "val_tokens": 512}


@pytest.fixture(scope="session", autouse=True)
def short_answers() -> Iterator[None]:
    """What models of no training say at the end of a run is not worth the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "LONGEST_ANSWER", 8)
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """Base, chat base and the skills ``a`` and ``b``, four steps each, by their own doors."""
    import train_full_sft
    import train_lora
    import train_pretrain

    folder = tmp_path_factory.mktemp("trained")
    made = Trained(folder / "out", *(folder / f"{name}.jsonl" for name in BUNDLED))
    for name, (bundled, rows) in BUNDLED.items():
        with bundled_data(bundled).open(encoding="utf-8") as file:
            (folder / f"{name}.jsonl").write_text("".join(islice(file, rows)), encoding="utf-8")
    train_pretrain.main(made.flags(data_path=made.texts, dim=64, n_layers=2, n_heads=4, **SMALL))
    train_full_sft.main(made.flags(data_path=made.chats, **SMALL))
    argv = made.flags(data_path=made.chats, general_data=made.general, **SMALL)
    for name in ("a", "b"):
        train_lora.main([*argv, *flags(lora_name=name, seed=ord(name))])
    return made


def ragged_batch(rows: int, seed: int, length: int = 12, vocab: int = 320) -> Batch:
    """Random ids with a differently long learned part in each row."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, length), generator=rng)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : int(torch.randint(1, length, (1,), generator=rng))] = -100
    n_targets = int((labels != -100).sum())
    return Batch({"input_ids": ids}, labels, n_targets, n_targets, ids.numel())


def rows_of(batch: Batch, start: int, end: int) -> Batch:
    labels, ids = batch.labels[start:end], batch.inputs["input_ids"][start:end]
    n_targets = int((labels != -100).sum())
    return Batch({"input_ids": ids}, labels, n_targets, n_targets, labels.numel())


IDS = torch.arange(40).view(2, 20) + 3


def logits_of(model) -> torch.Tensor:
    """Of all positions of ``IDS``."""
    with torch.no_grad():
        return model(input_ids=IDS).logits


def strengthen(model, seed: int) -> None:
    """Move the LoRA of ``model`` so far from its start that it matters, B included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def divergence_sum(model, batch: Batch) -> torch.Tensor:
    """KL(p_base || p_model), summed over the targets: two models, all logits, the formula."""
    base = copy.deepcopy(model)
    remove_lora(base)
    with torch.no_grad():
        log_p = base.eval()(**batch.inputs).logits[:, :-1].log_softmax(-1)
    log_q = model(**batch.inputs).logits[:, :-1].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)[batch.labels[:, 1:] != IGNORED].sum()


@pytest.fixture
def sharp_model(tiny_model) -> MiniMindLM:
    """The tiny model with weights so large that a wrong mask or angle shows in attention."""
    fill(tiny_model.named_parameters())
    return tiny_model


class Source:
    """The same steps every epoch; ``asked`` lists the epochs and starts that were asked for."""

    def __init__(self, *steps: list[Batch]):
        self.all_steps, self.steps_per_epoch = list(steps), len(steps)
        self.rows_per_step = max(sum(len(batch.labels) for batch in step) for step in steps)
        self.asked = []

    def steps(self, epoch: int, start: int = 0):
        self.asked.append((epoch, start))
        return iter(self.all_steps[start:])

    def largest_batches(self) -> list[Batch]:
        batches = [batch for step in self.all_steps for batch in step]
        kinds = [[batch for batch in batches if batch.kind == kind] for kind in KINDS]
        return [max(found, key=lambda batch: batch.labels.numel()) for found in kinds if found]


def run_training(
    model,
    source,
    folder: Path,
    *,
    loss=causal_loss_sum,
    write=lambda metrics: None,
    validation=None,
    runtime=CPU,
    groups=None,
    verdict=None,
    **flags,
) -> Summary:
    """Train ``model`` as a door would, with run states and metrics in ``folder``."""
    settings = {"epochs": 4, "learning_rate": 1e-2, "warmup_iters": 1, "save_interval": 100}
    options = TrainOptions(**settings | flags)
    run = Run(
        options,
        runtime,
        states=RunStates(folder / "states", {}, resume=options.resume),
        validation=validation or Validation({"val": lambda: Metrics(0.0, 0.0, 0, 0)}),
        write_files=write,
        log_to=folder / "metrics" / "run.jsonl",
        verdict=verdict,
    )
    groups = groups or param_groups(model, options.weight_decay, options.optimizer)
    return train(model, source, groups, run, loss)
