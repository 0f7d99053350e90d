"""Skills beside one model: one of them active, or a weighted mix, swapped without a trace in the
base.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from os import PathLike

import torch
from torch import Tensor, nn

from core.errors import UserError
from model.lora.layer import (
    LoRA,
    adapted,
    attach,
    dense_weight,
    is_quantized,
    merged,
    remove_lora,
    write_weight,
)
from model.lora.skill_file import adapters_in
from model.lora.targets import check_receptive
from model.lora.variants import DoRA, lora_of

Factors = dict[str, tuple[Tensor, Tensor]]  # of each target: A (rank, inputs), B (outputs, rank)


class SkillLibrary:
    """The skills of ``model``, which gets no other LoRA as long as this is used.

    The base's weights and state-dict keys never change; what is not active lies outside the model.
    With none active each Linear has its own forward again. A compiled model needs no new program
    for a swap between skills of the same ranks and targets.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.active: dict[str, float] = {}  # the weights of what the model carries
        self._skills: dict[str, dict[str, LoRA]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._skills)

    def __contains__(self, name: str) -> bool:
        return name in self._skills

    def add(self, name: str, path: str | PathLike, *, allow_base_mismatch: bool = False) -> dict:
        """Read the skill file ``path`` as ``name``, in place of an inactive skill of that name;
        returns its ``_meta``.

        Raises ``UserError`` for a file that does not fit (see ``check_lora``) and for the name of
        an active skill.
        """
        self._refuse_active(name)
        loras, meta = adapters_in(self.model, path, allow_base_mismatch=allow_base_mismatch)
        with torch.no_grad():
            for (
                lora
            ) in loras.values():  # so that no program depends on a number that a swap changes
                lora.B.weight.mul_(lora.scaling)
                lora.scaling = 1.0
        self._skills[name] = loras
        return meta

    def use(self, skills: str | Mapping[str, float] | None) -> None:
        """Make this the active skill, the mix ``{name: weight}``, or for None the base alone.

        A mix computes the exact weighted sum of the updates. Raises ``UserError``, before anything
        changes, for an unknown name, a weight that is not finite, a DoRA in a mix, and while a LoRA
        is merged into the model.
        """
        weights = {skills: 1.0} if isinstance(skills, str) else dict(skills or {})
        loras = self._mixed(weights)
        check_receptive(self.model)
        remove_lora(self.model)
        attach(self.model, loras)
        self.active = weights

    def remove(self, name: str) -> None:
        """Forget an inactive skill. Raises ``UserError`` for an unknown or an active one."""
        self._skill(name)
        self._refuse_active(name)
        del self._skills[name]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base alone; afterwards it carries again what it did.

        Raises ``UserError`` while a LoRA is merged into the model.
        """
        check_receptive(self.model)
        removed, active = remove_lora(self.model), self.active
        try:
            yield
        finally:  # whatever was used or merged meanwhile
            if any(True for _ in merged(self.model)):
                unmerge_lora(self.model)
            remove_lora(self.model)
            attach(self.model, removed)
            self.active = active

    def factors(self, weights: Mapping[str, float]) -> Factors:
        """The exact weighted sum of these skills, as products. Raises ``UserError`` as ``use``
        does.
        """
        return mixed(
            [(factors_of(self._skill(name), name), weight) for name, weight in weights.items()]
        )

    def _mixed(self, weights: dict[str, float]) -> dict[str, LoRA]:
        if list(weights.values()) == [1.0]:
            (name,) = weights
            return self._skill(name)
        return {
            target: lora_of(self.model.get_submodule(target), {"A.weight": A, "B.weight": B})
            for target, (A, B) in self.factors(weights).items()
        }

    def _skill(self, name: str) -> dict[str, LoRA]:
        if name not in self._skills:
            raise UserError(
                f"there is no skill {name!r} in the library; there are {', '.join(self._skills) or 'none'}"
            )
        return self._skills[name]

    def _refuse_active(self, name: str) -> None:
        if name in self.active:
            raise UserError(f"skill {name!r} is active; use another one first")


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Write each update into its Linear's weight: computed in fp32, rounded to the weight's dtype
    once.

    Weights and LoRA are kept, for ``unmerge_lora``. Raises ``UserError``, before anything changes,
    when there is no LoRA, when one is merged already, for weights of 4 bits, for a weight that
    another module uses too, and where a merged weight would not be finite.
    """
    check_receptive(model)
    if any(is_quantized(linear) for _, linear in adapted(model)):
        raise UserError("a 4-bit weight has no room for an update; call dequantize(model) first")
    weights = {name: linear.lora.merged(dense_weight(linear)) for name, linear in adapted(model)}
    if not weights:
        raise UserError(
            "there is no LoRA on this model to merge; call apply_lora or attach_lora first"
        )
    users = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    for name, weight in weights.items():
        if users[id(model.get_submodule(name).weight)] > 1:
            raise UserError(
                f"{name} shares its weight with another module, so keep its LoRA attached: none is merged"
            )
        if not weight.isfinite().all():
            raise UserError(
                f"merging would put NaN or infinity into {name}; go back to an earlier skill file"
            )
    for name, lora in remove_lora(model).items():
        linear = model.get_submodule(name)
        linear.unmerged = linear.weight.clone(), lora  # a tuple is no child: state-dict keys stay
        write_weight(linear, weights[name])


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Put back the weights and the LoRA that ``merge_lora`` found, bit for bit. Raises
    ``UserError`` if none did.
    """
    found = dict(merged(model))
    if not found:
        raise UserError("no LoRA is merged into this model")
    for linear in found.values():
        linear.weight.copy_(linear.unmerged[0])
    attach(model, {name: linear.unmerged[1] for name, linear in found.items()})
    for linear in found.values():
        del linear.unmerged


def factors_of(loras: Mapping[str, LoRA], name: str) -> Factors:
    """The updates of the skill ``name`` as products. Raises ``UserError`` for DoRA, which is
    none.
    """
    if any(isinstance(lora, DoRA) for lora in loras.values()):
        raise UserError(
            f"skill {name} is a DoRA, which rescales the base's weights and so has no weighted sum"
        )
    exported = {target: lora.exported() for target, lora in loras.items()}
    return {
        target: (parts["A.weight"].detach(), loras[target].scaling * parts["B.weight"].detach())
        for target, parts in exported.items()
    }


def mixed(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """The sum of weight times update, exactly: the ranks of a target add up. A negative weight
    subtracts.

    Raises ``UserError`` for weights that are no numbers, or so large that a product is not finite.
    """
    if wrong := [
        weight for _, weight in parts if not isinstance(weight, Real) or not math.isfinite(weight)
    ]:
        raise UserError(f"a skill's weight must be a number, not {wrong[0]}")
    targets = dict.fromkeys(target for factors, _ in parts for target in factors)
    sums = {}
    for target in targets:
        there = [(*factors[target], weight) for factors, weight in parts if target in factors]
        sums[target] = (
            torch.cat([A for A, _, _ in there]),
            torch.cat([weight * B for _, B, weight in there], dim=1),
        )
        if not sums[target][1].isfinite().all():
            raise UserError(
                f"the weights {', '.join(f'{weight:g}' for _, weight in parts)} are too large for {target}"
            )
    return sums


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest updates of at most ``rank``, by singular values, and the share of the whole that
    is lost.

    The share is the norm of what is left out over the norm of all (Frobenius, over all targets; 0
    for no update).
    """
    cut, lost, whole = {}, 0.0, 0.0
    for target, (A, B) in factors.items():
        # B A = Qb (Rb Ra') Qa', so the singular values are those of a small square matrix.
        (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
        U, S, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        root = S[:rank].sqrt()
        cut[target] = (root[:, None] * (V[:rank] @ Qa.T)).to(A), ((Qb @ U[:, :rank]) * root).to(B)
        lost, whole = lost + float(S[rank:].square().sum()), whole + float(S.square().sum())
    return cut, math.sqrt(lost / whole) if whole else 0.0
