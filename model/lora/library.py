"""Skills beside one model: swapped and mixed without a trace in the base, or merged into it."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from os import PathLike

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from core.errors import UserError
from model.lora.layer import (
    Linear,
    LoRA,
    adapted,
    attach,
    dense_weight,
    detach,
    exchange,
    is_quantized,
)
from model.lora.skill_file import Skill, SkillMeta, adapters_in
from model.lora.targets import check_receptive, linears
from model.lora.variants import DoRA, lora_of

Factors = dict[str, tuple[Tensor, Tensor]]  # of each target: A (rank, inputs), B (outputs, rank)


class SkillLibrary:
    """The skills of ``model``, which gets no other LoRA as long as this is used.

    The base's weights and state-dict keys never change; with no skill active each Linear has its
    own forward again. Swaps between skills of the same ranks and targets need no recompilation.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.active: dict[str, float] = {}  # the weights of what the model carries
        self._skills: dict[str, dict[str, LoRA]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._skills)

    def add(
        self, name: str, path: str | PathLike, skill: Skill | None = None, **allowed: bool
    ) -> SkillMeta:
        """Read the skill file ``path`` as ``name``, for the next ``use``; returns its meta.

        ``skill``, ``allowed`` and the ``UserError`` are those of ``adapters_in``.
        """
        loras, meta = adapters_in(self.model, path, skill, **allowed)
        for lora in loras.values():  # so that no compiled program depends on a skill's own number
            lora.B.weight = nn.Parameter(lora.B.weight.detach() * lora.scaling)
            lora.scaling = 1.0
        self._skills[name] = loras
        return meta

    def use(self, skills: str | Mapping[str, float] | None) -> None:
        """Make this the active skill, the mix ``{name: weight}``, or for None the base alone.

        A mix is the exact weighted sum. Raises ``UserError``, before anything changes, for an
        unknown name, a weight that is not finite, a DoRA in a mix, and while a LoRA is merged.
        """
        weights = {skills: 1.0} if isinstance(skills, str) else dict(skills or {})
        if list(weights.values()) == [1.0]:
            loras = self._skill(*weights)
        else:
            loras = loras_of(self.model, self.factors(weights))
        check_receptive(self.model)
        exchange(self.model, loras)
        self.active = weights

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base alone. Raises ``UserError`` while a LoRA is merged."""
        check_receptive(self.model)
        taken, active = exchange(self.model, {}), self.active
        try:
            yield
        finally:  # whatever was used or merged meanwhile
            if _merged(self.model):
                unmerge_lora(self.model)
            exchange(self.model, taken)
            self.active = active

    def factors(self, weights: Mapping[str, float]) -> Factors:
        """The exact weighted sum of these skills. Raises ``UserError`` as ``use`` does."""
        return mixed([(factors_of(self._skill(name), name), w) for name, w in weights.items()])

    def _skill(self, name: str) -> dict[str, LoRA]:
        if name not in self._skills:
            there = ", ".join(self._skills) or "none"
            raise UserError(f"there is no skill {name!r} in the library; there are {there}")
        return self._skills[name]


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Write each update into its Linear's weight: in fp32, rounded to the weight's dtype once.

    ``unmerge_lora`` undoes it. Raises ``UserError``, before anything changes, without a LoRA, when
    one is merged already, for weights of 4 bits or shared ones, and where a sum is not finite.
    """
    check_receptive(model)
    found, weights = dict(adapted(model)), {}
    if not found:
        raise UserError("there is no LoRA on this model to merge; call attach_lora first")
    if any(map(is_quantized, found.values())):
        raise UserError("a 4-bit weight has no room for an update; call dequantize(model) first")
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, linear in found.items():
        weights[name] = linear.lora.merged(dense_weight(linear))
        if users[id(linear.weight)] > 1:
            raise UserError(f"{name} shares its weight with another module: keep LoRA attached")
        if not weights[name].isfinite().all():
            raise UserError(f"merging would put NaN or infinity into {name}; use an older skill")
    for name, linear in found.items():
        # A tuple is no child: state-dict keys stay.
        linear.unmerged = linear.weight.clone(), detach(linear)
        linear.weight.copy_(weights[name].T if isinstance(linear, Conv1D) else weights[name])


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undo ``merge_lora`` bit for bit. Raises ``UserError`` if no LoRA is merged."""
    found = _merged(model)
    if not found:
        raise UserError("no LoRA is merged into this model")
    for linear in found:
        weight, lora = linear.unmerged
        del linear.unmerged
        linear.weight.copy_(weight)
        attach(linear, lora)


def _merged(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if "unmerged" in vars(module)]


def loras_of(model: nn.Module, factors: Factors) -> dict[str, LoRA]:
    """The updates that compute these products, for the Linears of ``model``, by name."""
    found = linears(model)
    tensors = {target: {"A.weight": A, "B.weight": B} for target, (A, B) in factors.items()}
    return {target: lora_of(found[target], parts) for target, parts in tensors.items()}


def factors_of(loras: Mapping[str, LoRA], name: str) -> Factors:
    """The updates of skill ``name`` as products. Raises ``UserError`` for DoRA, which is none."""
    factors = {}
    for target, lora in loras.items():
        if isinstance(lora, DoRA):
            raise UserError(f"skill {name} is a DoRA, which rescales weights: it has no sum")
        A, B = (tensor.detach() for tensor in lora.exported().values())
        factors[target] = A, lora.scaling * B
    return factors


def mixed(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """The exact weighted sum. Raises ``UserError`` where a weight or the sum is not finite."""
    collected = defaultdict(list)  # of each target: (A, weight * B) of the skills that have it
    for factors, weight in parts:
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise UserError(f"a skill's weight must be a number, not {weight}")
        for target, (A, B) in factors.items():
            collected[target].append((A, weight * B))
    sums = {}
    for target, products in collected.items():
        A, B = zip(*products, strict=True)
        sums[target] = torch.cat(A), torch.cat(B, dim=1)
        if not sums[target][1].isfinite().all():
            weights = ", ".join(f"{weight:g}" for _, weight in parts)
            raise UserError(f"the weights {weights} are too large for {target}")
    return sums


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest updates of at most ``rank``, and the share of the Frobenius norm that is lost."""
    cut, lost, whole = {}, 0.0, 0.0
    for target, (A, B) in factors.items():
        # B A = Qb (Rb Ra') Qa', so the singular values are those of a small square matrix.
        (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
        U, S, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        root = S[:rank].sqrt()
        cut[target] = (root[:, None] * (V[:rank] @ Qa.T)).to(A), ((Qb @ U[:, :rank]) * root).to(B)
        lost, whole = lost + float(S[rank:].square().sum()), whole + float(S.square().sum())
    return cut, math.sqrt(lost / whole) if whole else 0.0
