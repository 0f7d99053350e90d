"""A conversion succeeds only after what it wrote was read again and computes the same."""

import torch
from torch import Tensor, nn

from core.errors import UserError

POSITIONS = 32  # a wrong order of rotary features does not show in the first
EXACT = 1e-4  # of the largest logit: what fp32 sums in another order may differ by


def probe(vocab_size: int) -> Tensor:
    """Ids (1, ``POSITIONS``) that are spread over the vocabulary."""
    return (torch.arange(POSITIONS)[None] * 7919 + 3) % vocab_size


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """The fp32 logits (``POSITIONS``, vocabulary) of ``probe``, in evaluation mode."""
    config = model.config
    return model.eval()(input_ids=probe(config.vocab_size), use_cache=False).logits[0].float()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two logits (POSITIONS, V), divided by the largest logit."""
    return float((ours - theirs).abs().max() / ours.abs().max())


def require_same(ours: Tensor, theirs: Tensor, what: str, tolerance: float = EXACT) -> float:
    """Their ``difference``. Raises ``UserError`` where it is above ``tolerance`` or no number."""
    found = difference(ours, theirs)
    if not found <= tolerance:  # NaN, too
        raise UserError(
            f"{what} computes something else: its logits differ by {found:.1e} of the largest, "
            f"and {tolerance:.0e} is allowed; nothing was kept"
        )
    return found


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` itself, its fp32 weights rounded to ``dtype`` and back."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model
