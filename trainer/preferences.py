"""What preferences need beside their loss: the reference, and how far training moves from it."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from core.errors import UserError
from core.files import atomic_write, sha256_file
from core.paths import cache_dir
from dataset.batches import Batch
from dataset.chat import ENCODING
from dataset.preferences import PairSamples, PreferenceDataset
from dataset.tokenizer import tokenizer_fingerprint
from model.loss import answer_log_probs, preference_loss, preference_sum
from trainer import keeping
from trainer.keeping import Taught
from trainer.metrics import Validation
from trainer.options import SKILL_ONLY, SkillOptions
from trainer.runtime import Runtime
from trainer.stage import Base, base_result

TOGETHER = 16  # pairs of a pass that asks the base: another number would change the last digits


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
    """Give the pairs of ``data`` what the model of ``base`` says of them now.

    It is kept in the run's cache, and made anew for another base, skill, template or dtype.
    """
    cache = cache_dir(options.out_dir)
    known = [base.record.fingerprint, tokenizer_fingerprint(base.tokenizer), ENCODING]
    known += [options.load_in_4bit, str(runtime.dtype), options.max_seq_len]
    known += [sha256_file(options.skill, cache)] if options.skill else []
    for samples in [each for each in (data.train, data.val) if len(each.lengths)]:
        about = json.dumps([*known, samples.digests()]).encode()
        path = cache / f"reference-{hashlib.sha256(about).hexdigest()[:16]}.safetensors"
        with runtime.first_alone():
            samples.reference = read_reference(path, len(samples.lengths))
            if samples.reference is None:
                print(f"asking the base about {len(samples.lengths)} pairs, once", flush=True)
                samples.reference = log_probs(base.model, samples, runtime)
                content = save({"log_probs": samples.reference})
                atomic_write(path, lambda file, content=content: file.write(content))


def read_reference(path: Path, pairs: int) -> Tensor | None:
    """What was written to ``path``; None where that is missing or damaged."""
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        found = load(path.read_bytes())["log_probs"]
        if found.shape == (pairs, 2) and found.isfinite().all():
            return found
    return None


def check_dropout(model: nn.Module, lora_dropout: float) -> None:
    """Raise ``UserError`` for dropout: a loss that compares exact probabilities would be noise."""
    drops = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    config = [getattr(model.config, name, 0) or 0 for name in ("dropout", "attention_dropout")]
    if most := max(*drops, *config, lora_dropout, 0):
        wrong = f"preferences compare exact probabilities, and here dropout is {most}"
        raise UserError(f"{wrong}: set it to 0, in the base's configuration if it stands there")


def plugged(
    options: SkillOptions,
    base: Base,
    data: PreferenceDataset,
    runtime: Runtime,
    model: nn.Module,
    beta: float,
) -> dict:
    """As ``keeping.plugged``, for pairs."""
    functions = (partial(each, beta=beta) for each in (pair_loss_sum, evaluate_pairs))
    found = keeping.plugged(options, base, data, runtime, model, Taught("pairs", *functions))
    found["verdict"] = partial(verdict, found["validation"], found["verdict"])
    return found


def verdict(validation: Validation, told: Callable[[], dict]) -> dict:
    """Print what the last held-out pairs say, before and beside what ``told`` says of any run."""
    if last := validation.results["pairs"].get("last"):
        print(preferred(last))
    return told()


def preferred(result: dict) -> str:
    """One line on a result of pairs."""
    share, nats = result["accuracy"], [result[name] for name in ("margin", "chosen", "rejected")]
    moved = "by {:.2f} nats: chosen answers moved by {:+.2f}, rejected ones by {:+.2f}"
    return f"preferred in {share:.0%} of {result['targets']} pairs, {moved.format(*nats)}"


def whole_result(path: Path, model: nn.Module, options: SkillOptions, base: Base) -> dict:
    """What ``run_stage`` needs to write all weights to ``path``."""
    result = base_result("rlhf", path, model, options, base, base.record.val_ratio)
    # What its base has learned, it has learned, too: the run of a skill on it must know that.
    record, learned = result["record"], base.record.data
    record.data += [entry | {"option": "base"} for entry in learned if "sha256" in entry]
    record.options = {k: v for k, v in record.options.items() if k not in SKILL_ONLY}
    return result


@torch.no_grad()
def log_probs(model: nn.Module, samples: PairSamples, runtime: Runtime) -> Tensor:
    """What ``model`` says of both answers of each pair, (pairs, 2) fp64 on the CPU."""
    found, was_training = torch.zeros(len(samples.lengths), 2, dtype=torch.float64), model.training
    model.eval()
    for indices, batch in samples.in_order(TOGETHER):
        batch = runtime.move(batch)
        with runtime.autocast():
            both = answer_log_probs(model, batch.inputs, batch.labels)
        found[indices] = both.cpu().double().view(2, -1).T
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
