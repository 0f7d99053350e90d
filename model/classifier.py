"""Text classifiers on Hugging Face bases: a pretrained body, and a head that is new and trained whole."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from core.errors import UserError
from core.files import atomic_write
from model.bases import is_pretrained
from model.kernels import IGNORED
from model.weights import copy_strictly, read_tensors


def open_classifier(base: Path, labels: Sequence[str]) -> nn.Module:
    """The fp32 classifier for ``labels`` on a Hugging Face model; its head is drawn anew. ``base_model`` is its body.

    What trains is marked so: all of the head, and weights of the body that the base lacks. Raises ``UserError`` for
    what cannot be loaded.
    """
    if not is_pretrained(base):
        raise UserError(f"--base {base} is neither a folder with a config.json nor owner/model on the hub")
    name = str(base) if base.exists() else base.as_posix()
    names = dict(enumerate(labels))
    settings = {"num_labels": len(labels), "id2label": names, "label2id": {label: n for n, label in names.items()}}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except Exception as error:  # a file, the network or the library's own checks: many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--base {base} cannot be loaded as a classifier ({reason[:200]})") from error
    body = {id(parameter) for parameter in model.base_model.parameters()}
    if model.base_model is model or not body:
        raise UserError(f"--base {base} has no body apart from its head: another kind of model is needed")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) not in body or parameter_name in report["missing_keys"])
    return model


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """What trains in a classifier beside a LoRA, by name."""
    added = {id(p) for module in model.modules() if hasattr(module, "lora") for p in module.lora.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in added}


def save_head(model: nn.Module, path: Path) -> None:
    """Write ``head_state`` as a plain ``.pth``."""
    tensors = {name: parameter.detach().float().cpu() for name, parameter in head_state(model).items()}
    atomic_write(path, lambda file: torch.save(tensors, file))


def load_head(model: nn.Module, path: Path) -> None:
    """Copy such a file into a classifier from ``open_classifier``. Raises ``UserError`` where it does not fit."""
    copy_strictly(head_state(model), read_tensors(path), path)


def class_loss_sum(model: nn.Module, batch) -> Tensor:
    """Cross-entropy in nats summed over the rows of a ``Batch`` with ``labels`` (B,); 0 when there are none."""
    return F.cross_entropy(model(**batch.inputs).logits.float(), batch.labels, ignore_index=IGNORED, reduction="sum")
