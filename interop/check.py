"""A conversion succeeds only after what it wrote was read again and computes the same."""

import torch
from torch import Tensor, nn

from core.errors import UserError
from model.LMConfig import context_of

POSITIONS = 32  # a wrong order of rotary features does not show in the first
EXACT = 1e-4  # of the largest logit: what fp32 sums in another order may differ by
NOISE = 3e-6  # what they do differ by, so nothing smaller can be asked for


def probe(vocab_size: int, positions: int = POSITIONS) -> Tensor:
    """Ids (1, ``positions``) that are spread over the vocabulary, always the same."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, positions), generator=rng)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """The fp32 logits (T, V) of ``probe``, in evaluation mode.

    T is ``POSITIONS``, or the model's context where that is shorter.
    """
    config = model.config
    ids = probe(config.vocab_size, min(POSITIONS, context_of(config)))
    return model.eval()(input_ids=ids, use_cache=False).logits[0].float()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two logits (T, V), divided by the largest logit."""
    return float((ours - theirs).abs().max() / ours.abs().max())


def tolerance(ours: Tensor, base: Tensor) -> float:
    """How far a skill's logits (T, V) may be off: a hundredth of what it changes in its ``base``.

    A weak skill changes less than ``EXACT``, so that its loss would not show there.
    """
    return min(EXACT, max(NOISE, 0.01 * difference(ours, base)))


def require_same(ours: Tensor, theirs: Tensor, what: str, allowed: float = EXACT) -> float:
    """Their ``difference``. Raises ``UserError`` where it is above ``allowed`` or no number."""
    found = difference(ours, theirs)
    if not found <= allowed:  # NaN, too
        raise UserError(
            f"{what} computes something else: its logits differ by {found:.1e} of the largest, "
            f"and {allowed:.0e} is allowed; nothing was kept"
        )
    return found
