"""LoRA (Hu et al. 2021): a frozen Linear learns a low-rank update, which is a file of its own.

    x ──> Linear (frozen) ──────────────────> + ──> y
    └──> A (in -> rank) ──> B (rank -> out) ──┘     times alpha / rank

``apply_lora`` adds A and B as a child module of each target and patches that Linear's ``forward``,
so the base's state-dict keys stay what they were; ``remove_lora`` undoes it. Skills are files:
``save_lora``, ``load_lora`` into a model prepared with the same rank and targets, ``attach_lora``
for whatever the file needs. In lora/, layer.py has the formula and the patch, targets.py chooses
the Linears, config.py has all options, skill_file.py the file.
"""

from collections.abc import Sequence

from torch import nn

from core.errors import UserError
from model.lora.config import LoRAConfig
from model.lora.layer import LoRA, adapted, attach, detach
from model.lora.skill_file import attach_lora, load_lora, save_lora
from model.lora.targets import check_receptive, choose_targets
from model.lora.variants import DoRA, PiSSA

__all__ = ["LoRA", "apply_lora", "attach_lora", "load_lora", "remove_lora", "save_lora"]


def apply_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: str | Sequence[str] = "square",
    config: LoRAConfig | None = None,
    **options,
) -> list[str]:
    """Freeze ``model`` and give its target Linears a trainable update; returns their names.

    ``target_modules``: "square" (as many inputs as outputs), "all-linear", a regular expression for
    whole module names, or a list of names, name endings or expressions. A Linear tied to an
    embedding is never a target. ``alpha`` None means a scale of 1. ``options``: the others of
    ``LoRAConfig``; a ``config`` replaces them all. The new parameters are fp32 on the Linear's
    device. Raises ``UserError`` if LoRA is already applied, for impossible options, where nothing
    matches, and as ``check_receptive`` does.
    """
    if next(adapted(model), None):
        raise UserError("LoRA is already applied to this model; call remove_lora(model) first")
    check_receptive(model)
    config = config or LoRAConfig(rank, alpha, target_modules, **options)
    dropout, init = config.lora_dropout, config.init_lora_weights
    kind = PiSSA if init == "pissa" else DoRA if config.use_dora else LoRA
    targets = choose_targets(model, config)
    loras = {n: kind(m, *config.rank_and_scaling(n), dropout, init) for n, m in targets.items()}
    model.requires_grad_(False)  # freeze first: whatever is added below is what trains
    for name, lora in loras.items():
        attach(targets[name], lora)
    return list(loras)


def remove_lora(model: nn.Module) -> None:
    """Undo ``apply_lora``: the base is bit for bit as before, and stays frozen."""
    for _, linear in list(adapted(model)):
        detach(linear)
