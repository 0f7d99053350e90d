"""What preferences need beside their loss: the reference, and how far training moves from it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from core.files import atomic_write
from core.paths import cache_dir
from dataset.batches import KEEP, Batch
from dataset.preferences import PairSamples
from model.loss import answer_log_probs, keep_sum, preference_loss, preference_sum
from trainer.options import TrainOptions
from trainer.runtime import Runtime


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


def with_reference(
    samples: PairSamples,
    model: nn.Module,
    known: Iterable[str],
    options: TrainOptions,
    runtime: Runtime,
) -> PairSamples:
    """``samples`` with what ``model`` says of them now, kept in the run's cache.

    ``known``: fingerprints of the model and its tokenizer; another of either is asked anew.
    """
    settings = [samples.max_seq_len, str(runtime.dtype), samples.digests(), *known]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = cache_dir(options.out_dir) / f"reference-{key}.safetensors"
    with runtime.first_alone():
        if not path.is_file():
            print(f"asking the base about {len(samples.lengths)} pairs, once", flush=True)
            content = save({"log_probs": log_probs(model, samples, options.batch_size, runtime)})
            atomic_write(path, lambda file: file.write(content))
    return replace(samples, reference=load(path.read_bytes())["log_probs"])


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


def pair_loss_sum(model: nn.Module, batch: Batch, *, base: nn.Module, beta: float) -> Tensor:
    """The loss of pairs; on general chats, how far ``model`` is from its base."""
    if batch.kind == KEEP:
        return keep_sum(model, base, batch.inputs, batch.labels)
    return preference_sum(model, batch.inputs, batch.labels, batch.reference, beta)


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module, batches: Iterable[Batch], runtime: Runtime, beta: float
) -> PairMetrics:
    """How far ``model`` prefers the chosen answers of ``batches``. It keeps its mode."""
    moved, was_training = [], model.training
    model.eval()
    for batch in map(runtime.move, batches):
        with runtime.autocast():
            now = answer_log_probs(model, batch.inputs, batch.labels)
        moved.append((now - batch.reference.to(now)).view(2, -1).cpu())
    model.train(was_training)
    chosen, rejected = torch.cat(moved, 1) if moved else torch.zeros(2, 0)
    margins = chosen - rejected
    means = [x.double().mean().item() for x in (margins > 0, margins, chosen, rejected)]
    return PairMetrics(preference_loss(margins, beta).mean().item(), *means, len(margins))
