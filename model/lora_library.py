"""Skills beside one model: one of them active, or a weighted mix, swapped without a trace in the
base.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike

import torch
from torch import nn

from core.errors import UserError
from model.lora_layers import LoRA, lora_of
from model.lora_merge import unmerge_lora
from model.lora_mix import Factors, factors_of, mixed
from model.lora_targets import check_receptive, merged
from model.model_lora import adapters_in, attach, remove_lora


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
