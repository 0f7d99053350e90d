"""What the written formats keep of fp32 weights, in our own arithmetic."""

import torch
from torch import Tensor, nn

from core.options import require

BLOCKS = ("q8_0", "q4_0")  # llama.cpp's formats with a scale for each block
BLOCK = 32  # the weights of a row that make a block


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` itself, its fp32 weights rounded to ``dtype`` and back."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def kept(weight: Tensor, dtype: str, name: str) -> Tensor:
    """What ``dtype`` keeps of a weight, fp32. Raises ``UserError`` if its rows make no blocks."""
    if dtype not in BLOCKS:
        return weight.to(getattr(torch, dtype)).float()
    width = weight.size(-1)
    require(width % BLOCK == 0, f"{name} has rows of {width}, no multiple of {BLOCK}: use float16")
    blocks = weight.reshape(-1, BLOCK)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    step = extreme.abs() / 127 if dtype == "q8_0" else extreme / -8
    steps = blocks * torch.where(step == 0, 0, 1 / step)
    if dtype == "q8_0":
        whole = (steps.abs() + 0.5).floor() * steps.sign()  # a half goes away from zero
    else:
        whole = (steps + 8.5).floor().clamp(0, 15) - 8
    return (whole * step.half()).view_as(weight)
