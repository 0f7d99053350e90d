"""What a benchmark asks of a model: how likely are these ids after those?

As in lm-evaluation-harness 0.4.13, zero-shot and without chat template, where these are
``TemplateLM._encode_pair`` (lm_eval/api/model.py), ``get_rolling_token_windows`` made disjoint
(lm_eval/utils.py) and ``HFLM`` (lm_eval/models/huggingface.py); but here, nothing that a text
spells becomes a control token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from dataset.batches import IGNORED, micro_batches

DELIMITER = " "  # between a question's words and an answer


@dataclass(frozen=True)
class Request:
    """Score ``continuation``, at least one id, after ``context``, at least one id."""

    context: list[int]
    continuation: list[int]


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, with those that the tokenizer puts around every text, if any."""
    settings = {"split_special_tokens": True, "verbose": False}  # a text may be of any length
    return tokenizer(list(texts), **settings).input_ids


def pair_requests(
    tokenizer: PreTrainedTokenizerBase, context: str, answers: Sequence[str], max_seq_len: int
) -> list[Request]:
    """Each answer after ``context`` and a space; a context that is too long loses its beginning.

    An answer's ids are those of both together behind the ids of the context alone; blanks that end
    the context belong to the answers. Raises ``UserError`` for an answer that has no ids of its
    own or more than ``max_seq_len``, or a context of blanks only.
    """
    kept = context.rstrip()
    before, *whole = text_ids(tokenizer, [kept, *(context + DELIMITER + a for a in answers)])
    requests = []
    for answer, ids in zip(answers, whole, strict=True):
        continuation = ids[len(before) :]
        if not before or not 0 < len(continuation) <= max_seq_len:
            ids_of = f"{len(continuation)} ids of its own after {len(before)} of the question"
            limit = f"max_seq_len is {max_seq_len}; shorten or lengthen it, or raise max_seq_len"
            raise UserError(f"the answer {answer[:40]!r} has {ids_of}, and {limit}")
        room = max_seq_len + 1 - len(continuation)  # the last id is only predicted
        requests.append(Request(before[-room:], continuation))
    return requests


def rolling_requests(ids: list[int], prefix: int, max_seq_len: int) -> list[Request]:
    """Every id of a text exactly once, in windows of ``max_seq_len`` ids.

    The first window follows the id ``prefix``, each next one a single id; the last one, which may
    be shorter, follows as many as fill it up.
    """
    requests = [Request([prefix], ids[:max_seq_len])] if ids else []
    for start in range(max_seq_len, len(ids), max_seq_len):
        end = min(start + max_seq_len, len(ids))
        requests.append(Request(ids[end - max_seq_len - 1 : start], ids[start:end]))
    return requests


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that comes before a text: bos, or eos where there is none."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def collated(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``targets``, both (B, T) int64: position t is to predict ``targets[:, t]``.

    Right-padded with id 0 and ``IGNORED``, which also stands at positions within a context.
    """
    longest = max(map(length_of, requests))
    inputs = torch.zeros(len(requests), longest, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORED)
    for row, each in enumerate(requests):
        ids, end = torch.tensor(each.context + each.continuation), length_of(each)
        inputs[row, :end] = ids[:-1]
        targets[row, end - len(each.continuation) : end] = ids[-len(each.continuation) :]
    return inputs, targets


def length_of(request: Request) -> int:
    """How many ids the model reads: the last one is only predicted."""
    return len(request.context) + len(request.continuation) - 1


def batches_of(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """The numbers of requests to compute together, of like length and ``micro_batches``' size."""
    lengths = np.array([length_of(each) for each in requests], np.int64)
    parts = micro_batches(lengths, np.arange(len(requests)), batch_size)
    return [part.tolist() for part in parts]
