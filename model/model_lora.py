"""LoRA (Hu et al. 2021): a frozen Linear learns a low-rank update, and the update is a file of its
own.

    x ──> Linear (frozen) ──────────────────> + ──> y
    └──> A (in -> rank) ──> B (rank -> out) ──┘     times alpha / rank

``apply_lora`` adds A and B as a child module of each target and patches that Linear's ``forward``,
so the base's state-dict keys stay what they were; ``remove_lora`` undoes it. Skills are files:
``save_lora``, ``load_lora`` into a model prepared with the same rank and targets, ``attach_lora``
for whatever the file needs. What an update computes stands in lora_layers.py, which Linears get one
in lora_targets.py, and all options in lora_config.py.
"""

from collections.abc import Sequence

from torch import nn

from core.errors import UserError
from model.lora.config import LoRAConfig
from model.lora.layer import LoRA, adapted, attach, remove_lora
from model.lora.skill_file import attach_lora, load_lora, save_lora
from model.lora.targets import check_receptive, choose_targets
from model.lora.variants import DoRA, PiSSA

__all__ = ["LoRA", "apply_lora", "attach_lora", "load_lora", "remove_lora", "save_lora"]


def apply_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: str | Sequence[str] = "square",
    **options,
) -> list[str]:
    """Freeze ``model`` and give its target Linears a trainable update; returns their names.

    ``target_modules``: "square" (as many inputs as outputs), "all-linear", a regular expression for
    whole module names, or a list of names or name endings. A Linear tied to an embedding is never a
    target. ``alpha`` None means a scale of 1. ``options``: the others of ``LoRAConfig``. The new
    parameters are fp32 on the Linear's device. Raises ``UserError`` if LoRA is already applied, for
    impossible options, where nothing matches, and as ``check_receptive`` does.
    """
    if any(True for _ in adapted(model)):
        raise UserError("LoRA is already applied to this model; call remove_lora(model) first")
    check_receptive(model)
    config = LoRAConfig(rank, alpha, target_modules, **options)
    adapters = {}
    for target in choose_targets(model, config):
        settings = (target.linear, target.rank, target.scaling, config.lora_dropout)
        if config.init_lora_weights == "pissa":
            adapters[target.name] = PiSSA(*settings)
        else:
            kind = DoRA if config.use_dora else LoRA
            adapters[target.name] = kind(*settings, config.init_lora_weights)
    model.requires_grad_(False)  # freeze first: whatever is added below is what trains
    attach(model, adapters)
    return list(adapters)
