"""Decoding: ids in, ids out, one at a time. Nothing here knows about text."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import UserError
from model.LMConfig import context_of
from model.model import CACHE


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep all."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512


@torch.no_grad()  # not inference_mode: training could not use the rotary table that it makes
def generate(
    model: nn.Module, ids: list[int], sampling: Sampling, stop: set[int], rng: torch.Generator
) -> Iterator[int]:
    """Yield new ids after the prompt ``ids``.

    It ends before an id in ``stop``, after ``max_new_tokens``, or where the context ends. ``rng``
    lives on the CPU, so that a seed means the same on every device. Raises ``UserError`` for a
    prompt that fills the context.
    """
    context = context_of(model.config)
    if not 0 < len(ids) < context:
        room = f"no room in the context of {context}"
        raise UserError(f"a prompt of {len(ids)} tokens leaves {room}; shorten it")
    seen, new, cache = list(ids), list(ids), None
    for _ in range(min(sampling.max_new_tokens, context - len(ids))):
        inputs = torch.tensor([new], device=next(model.parameters()).device)
        out = model(inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        token = next_token(out.logits[0, -1].float().cpu(), seen, sampling, rng)
        if token in stop:
            return
        yield token
        seen.append(token)
        new, cache = [token], out[CACHE]


def next_token(logits: Tensor, seen: list[int], sampling: Sampling, rng: torch.Generator) -> int:
    """Draw one id from fp32 ``logits`` (V,) on the CPU; ``seen`` ids get the repetition penalty."""
    logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = keep_top_p(keep_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=rng))


def penalize_repetition(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """Divide positive logits of ``seen`` by ``penalty``, multiply others (Keskar et al. 2019)."""
    if penalty == 1.0:
        return logits
    repeated = torch.tensor(sorted(set(seen)))
    values = logits[repeated]
    lowered = torch.where(values > 0, values / penalty, values * penalty)
    return logits.index_copy(0, repeated, lowered)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the ``k`` largest to -inf; 0 keeps all."""
    if not 0 < k < len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest ids whose probabilities reach ``p`` in sum; set others to -inf."""
    if p >= 1.0:
        return logits
    probabilities, order = logits.softmax(-1).sort(descending=True)
    # An id stays while what stands before it has not reached p: so the first always stays.
    dropped = order[probabilities.cumsum(-1) - probabilities >= p]
    return logits.index_fill(0, dropped, -torch.inf)
