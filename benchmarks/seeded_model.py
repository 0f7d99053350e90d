"""A MiniMindLM and LoRA whose weights follow from their names alone, and the logits to compare."""

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model.LMConfig import LMConfig
from model.model import CACHE, MiniMindLM
from model.model_lora import apply_lora

BATCH, LENGTH, PROMPT = 2, 72, 40


def seeded_model(settings: dict) -> tuple[MiniMindLM, Tensor]:
    """A model in eval mode with non-trivial norms and sharp attention, and ids (BATCH, LENGTH) for
    it.
    """
    model = MiniMindLM(LMConfig(**settings)).eval()
    fill(model.named_parameters())
    return model, hashed("ids", BATCH * LENGTH).view(BATCH, LENGTH) % model.config.vocab_size


def add_seeded_lora(model: nn.Module, rank: int) -> None:
    """``apply_lora`` with a B that is not zero."""
    apply_lora(model, rank)
    fill((name, p) for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def fill(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Set matrices to variance 1 / (2 inputs) and vectors (norms) to 1 +- 0.3."""
    for name, parameter in parameters:
        noise = uniform(name, parameter.numel()).view(parameter.shape)
        is_vector = parameter.dim() == 1
        parameter.copy_(1 + 0.3 * noise if is_vector else noise * (1.5 / parameter.shape[1]) ** 0.5)


def uniform(name: str, count: int) -> Tensor:
    """``count`` fp64 numbers in [-1, 1)."""
    return hashed(name, count).double() / 2**31 - 1


def hashed(name: str, count: int) -> Tensor:
    """``count`` int64 numbers in [0, 2^32), by integer arithmetic: the same on every platform and
    torch version.
    """
    x = (torch.arange(count) * 2654435761 + zlib.crc32(name.encode())) % 2**32
    for _ in range(2):
        x = (x ^ (x >> 16)) * 0x45D9F3B % 2**32
    return x ^ (x >> 16)


def swap_rotary_pair(model: MiniMindLM) -> None:
    """Exchange cosine and sine of the fastest rotary pair in a model that has run; twice brings
    them back.
    """
    fastest = model._rope[:, 0]
    fastest.copy_(torch.complex(fastest.imag, fastest.real))


@torch.no_grad()
def whole(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of all positions, computed at once."""
    return model(ids).logits


@torch.no_grad()
def one_by_one(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of all positions: PROMPT tokens at once, the others one at a time from the cache."""
    logits, cache = [], None
    for part in (ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)):
        out = model(part, cache=cache, use_cache=True)
        logits.append(out.logits)
        cache = out[CACHE]
    return torch.cat(logits, dim=1)
