"""What preferences need beside their loss: the reference, and how far training moves from it."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from core.errors import UserError
from core.files import atomic_write, sha256_file
from core.paths import cache_dir
from dataset.batches import Batch
from dataset.preferences import PairSamples, PreferenceDataset
from dataset.tokenizer import tokenizer_fingerprint
from model.loss import answer_log_probs, preference_loss, preference_sum
from trainer.options import SkillOptions, TrainOptions
from trainer.runtime import Runtime
from trainer.stage import Base


@dataclass(frozen=True)
class PairMetrics:
    """Means over ``targets`` pairs.

    ``accuracy`` is the share of pairs whose chosen answer has gained on the rejected one since the
    reference, ``margin`` by how much, ``chosen`` and ``rejected`` how far each moved, in nats.
    """

    loss: float
    accuracy: float
    margin: float
    chosen: float
    rejected: float
    targets: int


def add_references(
    data: PreferenceDataset, base: Base, options: SkillOptions, runtime: Runtime
) -> None:
    """Give the pairs of ``data`` what the model of ``base`` says of them now."""
    known = [base.record.fingerprint, tokenizer_fingerprint(base.tokenizer), options.load_in_4bit]
    known += [sha256_file(options.skill, cache_dir(options.out_dir))] if options.skill else []
    settings = known, options, runtime
    data.train = with_reference(data.train, base.model, *settings)
    data.val = with_reference(data.val, base.model, *settings)


def with_reference(
    samples: PairSamples,
    model: nn.Module,
    known: list,
    options: TrainOptions,
    runtime: Runtime,
) -> PairSamples:
    """``samples`` with what ``model`` says of them now, kept in the run's cache.

    ``known`` tells the model and its tokenizer: another of either is asked anew.
    """
    settings = [samples.max_seq_len, str(runtime.dtype), samples.digests(), *known]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = cache_dir(options.out_dir) / f"reference-{key}.safetensors"
    with runtime.first_alone():
        reference = read_reference(path)
        if reference is None:
            print(f"asking the base about {len(samples.lengths)} pairs, once", flush=True)
            reference = log_probs(model, samples, options.batch_size, runtime)
            content = save({"log_probs": reference})
            atomic_write(path, lambda file: file.write(content))
    return replace(samples, reference=reference)


def read_reference(path: Path) -> Tensor | None:
    """What ``with_reference`` wrote; None where there is none that can be read."""
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        return load(path.read_bytes())["log_probs"]
    return None


def check_dropout(model: nn.Module, lora_dropout: float) -> None:
    """Raise ``UserError`` for dropout: a loss that compares exact probabilities would be noise."""
    drops = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    config = [getattr(model.config, name, 0) or 0 for name in ("dropout", "attention_dropout")]
    if most := max(*drops, *config, lora_dropout, 0):
        wrong = f"preferences compare exact probabilities, and here dropout is {most}"
        raise UserError(f"{wrong}: set lora_dropout 0, and name a base that trained without it")


@torch.no_grad()
def log_probs(model: nn.Module, samples: PairSamples, batch_size: int, runtime: Runtime) -> Tensor:
    """What ``model`` says of both answers of each pair, (pairs, 2) fp64 on the CPU."""
    found, was_training = torch.zeros(len(samples.lengths), 2, dtype=torch.float64), model.training
    model.eval()
    for indices, batch in samples.in_order(batch_size):
        batch = runtime.move(batch)
        with runtime.autocast():
            both = answer_log_probs(model, batch.inputs, batch.labels)
        found[indices] = both.double().cpu().view(2, -1).T
    model.train(was_training)
    return found


def pair_loss_sum(model: nn.Module, batch: Batch, *, beta: float) -> Tensor:
    """The loss of the pairs in ``batch``, in nats, summed."""
    return preference_sum(model, batch.inputs, batch.labels, batch.reference, beta)


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module, batches: Iterable[Batch], runtime: Runtime, control: set[int], beta: float
) -> PairMetrics:
    """How far ``model`` prefers the chosen answers of ``batches``; called as ``evaluate`` is.

    The model keeps its mode.
    """
    moved, was_training = [], model.training
    model.eval()
    for batch in map(runtime.move, batches):
        with runtime.autocast(), torch.compiler.set_stance("force_eager"):
            now = answer_log_probs(model, batch.inputs, batch.labels)
        moved.append((now - batch.reference.to(now)).view(2, -1).cpu())
    model.train(was_training)
    chosen, rejected = torch.cat(moved, 1) if moved else torch.zeros(2, 0)
    margins = chosen - rejected
    means = [x.double().mean().item() for x in (margins > 0, margins, chosen, rejected)]
    return PairMetrics(preference_loss(margins, beta).mean().item(), *means, len(margins))
