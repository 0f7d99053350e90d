"""Text classifiers on Hugging Face bases: a pretrained body, and a head that is new and trained whole."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from core.errors import UserError
from core.files import atomic_write
from model.bases import is_pretrained, load_pretrained, quiet_library
from model.kernels import IGNORED
from model.weights import copy_strictly, fingerprint, read_tensors


def open_classifier(base: Path, labels: Sequence[str]) -> nn.Module:
    """The fp32 classifier for ``labels`` on a Hugging Face model, whose body is its ``base_model``.

    The head is drawn, unless the base has one for as many labels. What trains is marked so: all of the head, and
    weights of the body that the base lacks. Raises ``UserError`` for what cannot be loaded.
    """
    if not is_pretrained(base):
        raise UserError(f"--base {base} is neither a folder with a config.json nor owner/model on the hub")
    names = dict(enumerate(labels))
    settings = {"num_labels": len(labels), "id2label": names, "label2id": {label: n for n, label in names.items()}}
    settings["ignore_mismatched_sizes"] = True  # a head for other labels is no use here
    model, missing = load_pretrained(AutoModelForSequenceClassification, base, "text classifier", **settings)
    body = {id(parameter) for parameter in model.base_model.parameters()}
    if model.base_model is model or not body:
        raise UserError(f"--base {base} has no body apart from its head: another kind of model is needed")
    given = []
    for parameter_name, parameter in model.named_parameters():
        is_new = id(parameter) not in body or parameter_name in missing
        parameter.requires_grad_(is_new)
        given += [] if is_new else [(parameter_name, parameter)]
    model.base_model.known_as = fingerprint(given, model.config)
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


def save_classifier(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A Hugging Face folder, in place of one that may be there, which stays until the new one is whole."""
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    with quiet_library():
        model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def class_loss_sum(model: nn.Module, batch) -> Tensor:
    """Cross-entropy in nats summed over the rows of a ``Batch`` with ``labels`` (B,); 0 when there are none."""
    return F.cross_entropy(model(**batch.inputs).logits.float(), batch.labels, ignore_index=IGNORED, reduction="sum")
