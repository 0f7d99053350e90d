"""Updates of Linears as every format can hold them: A and B with scale 1, all of one rank."""

import torch
from torch import Tensor

from core.options import require

Parts = dict[str, Tensor]  # the tensors of one target, by their key in a skill file


def check_updates_only(tensors: Parts) -> None:
    """Raise ``UserError`` for tensors of a skill that are no updates of Linears."""
    extra = [name for name in tensors if name.startswith("_")]
    require(not extra, f"the skill holds {extra[:1]}, for which an adapter has no place")


def portable(parts: Parts, scaling: float, rank: int) -> Parts:
    """The same update with scale 1 and this rank, at least its own: zeros pad A and B."""
    A, B = parts["A.weight"].float(), parts["B.weight"].float() * scaling
    missing = rank - A.size(0)
    A = torch.cat((A, A.new_zeros(missing, A.size(1))))
    return {**parts, "A.weight": A, "B.weight": torch.cat((B, B.new_zeros(B.size(0), missing)), 1)}


def is_update(parts: Parts) -> bool:
    """Whether floats A (r, in), B (out, r) and perhaps a magnitude (out,) update a Linear."""
    shapes = shapes_of(parts)
    A, B = shapes.get("A.weight", ()), shapes.get("B.weight", ())
    fits = len(A) == len(B) == 2 and A[0] == B[1] >= 1
    fits = fits and shapes.get("magnitude") in (None, B[:1])
    return fits and all(tensor.is_floating_point() for tensor in parts.values())


def shapes_of(parts: Parts) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in parts.items()}
