"""Decoding: ids in, ids out. Nothing here knows about text."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import UserError
from model.LMConfig import context_of
from model.model import CACHE

TOGETHER = 64  # prompts at most that are decoded in one batch


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep all."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512


def generate(
    model: nn.Module, ids: list[int], sampling: Sampling, stop: set[int], rng: torch.Generator
) -> Iterator[int]:
    """Yield new ids after the prompt ``ids``.

    It ends before an id in ``stop``, after ``max_new_tokens``, or where the context ends. ``rng``
    lives on the CPU, so that a seed means the same on every device. Raises ``UserError`` for a
    prompt that fills the context.
    """
    for (token,) in _drawn(model, [ids], sampling, stop, [rng]):
        yield token


def generate_all(
    model: nn.Module,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    stop: set[int],
    rngs: Sequence[torch.Generator],
) -> list[list[int]]:
    """The new ids of each prompt, as ``generate`` gives them but for the rounding of a batch.

    Prompts of one length are decoded together: they need neither padding nor a mask.
    """
    found, alike = [[] for _ in prompts], defaultdict(list)
    for row, ids in enumerate(prompts):
        alike[len(ids)].append(row)
    for rows in alike.values():
        for some in (rows[n : n + TOGETHER] for n in range(0, len(rows), TOGETHER)):
            batch = [prompts[row] for row in some], sampling, stop, [rngs[row] for row in some]
            for tokens in _drawn(model, *batch):
                for row, token in zip(some, tokens, strict=True):
                    if token not in stop:
                        found[row].append(token)
    return found


@torch.no_grad()  # not inference_mode: training could not use the rotary table that it makes
def _drawn(
    model: nn.Module,
    prompts: list[list[int]],
    sampling: Sampling,
    stop: set[int],
    rngs: list[torch.Generator],
) -> Iterator[list[int]]:
    """Yield the next id of each of these prompts of one length, until all are at their end.

    After an id in ``stop`` a prompt gets it again and again, without a draw.
    """
    length, context = len(prompts[0]), context_of(model.config)
    if not 0 < length < context:
        room = f"no room in the context of {context}"
        raise UserError(f"a prompt of {length} tokens leaves {room}; shorten it")
    seen, new, cache = [list(ids) for ids in prompts], prompts, None
    for _ in range(min(sampling.max_new_tokens, context - length)):
        inputs = torch.tensor(new, device=next(model.parameters()).device)
        out = model(inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        for row, logits in enumerate(out.logits[:, -1].float().cpu()):
            ids = seen[row]
            ended = len(ids) > length and ids[-1] in stop
            ids.append(ids[-1] if ended else next_token(logits, ids, sampling, rngs[row]))
        new, cache = [ids[-1:] for ids in seen], out[CACHE]
        tokens = [token for (token,) in new]
        if stop.issuperset(tokens):
            return
        yield tokens


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
