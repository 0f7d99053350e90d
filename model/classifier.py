"""Text classifiers on Hugging Face bases: a pretrained body, and a new head that trains whole."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from core.errors import UserError, reason_of
from core.paths import is_pretrained
from model.huggingface import load_pretrained
from model.kernels import IGNORED
from model.LMConfig import check_length, context_of
from model.lora.layer import lora_parameters
from model.weights import check_keys, fingerprint

HEAD = "_head."  # comes before the names of a head's tensors in a skill file


def read_config(base: Path) -> PretrainedConfig:
    """The config of a Hugging Face model. Raises ``UserError`` if ``base`` is none."""
    if not is_pretrained(base):
        neither = "neither a folder with a config.json nor owner/model on the hub"
        raise UserError(f"base {base} is {neither}")
    try:
        return AutoConfig.from_pretrained(base.as_posix())
    except Exception as error:  # a file, the network or the library's own checks: many kinds
        reason = reason_of(error)
        raise UserError(f"the config of base {base} cannot be read ({reason})") from error


def open_classifier(base: Path, labels: Sequence[str]) -> nn.Module:
    """The fp32 classifier for ``labels`` on a Hugging Face model, whose body is its ``base_model``.

    A base that is a classifier for these very labels keeps its head and their order
    (``config.id2label``); otherwise the head is drawn. What trains is marked so: all of the head,
    and a pooler that the base lacks. Raises ``UserError`` for what cannot be loaded.
    """
    config = read_config(base)
    own = [str(config.id2label[n]) for n in sorted(config.id2label)]
    keeps_head = sorted(own) == sorted(labels)
    names = dict(enumerate(own if keeps_head else labels))
    settings = {"num_labels": len(names), "id2label": names}
    settings |= {"label2id": {label: n for n, label in names.items()}}
    settings |= {"problem_type": "single_label_classification", "ignore_mismatched_sizes": True}
    kind = AutoModelForSequenceClassification
    model, drawn = load_pretrained(kind, base, "text classifier", **settings)
    body = {id(parameter) for parameter in model.base_model.parameters()}
    if model.base_model is model or not body:
        raise UserError(f"base {base} has no body apart from its head: use another kind of model")
    head = {name: p for name, p in model.named_parameters() if id(p) not in body}
    missing = [name for name in drawn if name not in head]
    if lost := [name for name in missing if "pool" not in name]:
        few = ", ".join(lost[:3])
        raise UserError(f"base {base} lacks {few} of the shape that its config.json says")
    if not keeps_head and any(name not in drawn for name in head):
        fresh = type(model)(model.config).state_dict()
        with torch.no_grad():
            for name, parameter in head.items():
                parameter.copy_(fresh[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head or name in missing)
    given = [(name, p) for name, p in model.base_model.named_parameters() if not p.requires_grad]
    model.base_model.known_as = fingerprint(given, model.config)
    return model


def check_row_length(model: nn.Module, max_seq_len: int) -> None:
    """Raise ``UserError`` if rows of ``max_seq_len`` tokens do not fit the model's context."""
    context = context_of(model.config)
    for module in model.modules():  # RoBERTa and its kind count positions from the padding on
        is_positions = isinstance(module, nn.Embedding) and module.num_embeddings == context
        if is_positions and module.padding_idx is not None:
            max_seq_len += module.padding_idx + 1
    check_length(model.config, max_seq_len)


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a classifier that train beside a LoRA, by name."""
    added = {id(parameter) for parameter in lora_parameters(model)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: p for name, p in trained if id(p) not in added}


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """``head_state`` under the names that a skill file gives it."""
    return {HEAD + name: tensor for name, tensor in head_state(model).items()}


def head_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head among the tensors of a skill file, by name in the model; {} without one."""
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    return {name.removeprefix(HEAD): tensor for name, tensor in found.items()}


def load_head(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy a skill file's head into a classifier. Raises ``UserError`` first if it does not fit."""
    own, head = head_state(model), head_of(tensors)
    check_keys(own, head, path)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(head[name])


def class_loss_sum(model: nn.Module, batch) -> Tensor:
    """Cross-entropy in nats, summed over the rows of a ``Batch`` with ``labels`` (B,)."""
    logits = model(**batch.inputs).logits.float()
    return F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum")
