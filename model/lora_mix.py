"""Weighted sums of LoRA updates: exact by laying their ranks side by side, or cut to a chosen
rank.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from core.errors import UserError
from model.lora_layers import DoRA, LoRA

Factors = dict[
    str, tuple[Tensor, Tensor]
]  # of each target: A (rank, inputs) and B (outputs, rank), the scale in B


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
