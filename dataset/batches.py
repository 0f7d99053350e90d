"""From tokenised rows to the micro-batches of optimizer steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from dataset.token_table import TokenRows
from dataset.tokenized import CHAT, TEXT, split_rows, tokenize_files
from dataset.tokenizer import token_bytes
from dataset.workers import started

MICRO_TOKENS = (
    2048  # of one forward and backward pass: a CPU is no faster with more, and needs more memory
)
PASS_COST = 64  # a pass takes as long as this fraction of its largest size, however small it is
POOL = 50  # steps whose rows are sorted by length together: enough for little padding, few enough to stay random
IGNORED = -100  # the label of a position that is not learned, PyTorch's own default


@dataclass
class Batch:
    """One micro-batch.

    ``inputs``: what the model's forward takes, ``input_ids`` (B, T) int64, right-padded. ``labels``
    (B, T) int64: the id itself where it is learned, else -100; ``labels[:, 0]`` is -100 because
    nothing predicts it. ``n_targets``: how many labels are learned. ``n_bytes``: how many UTF-8
    bytes they stand for. ``n_tokens``: ids that are no padding.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    n_targets: int
    n_bytes: int
    n_tokens: int


class Samples(Protocol):
    """What ``Batches`` draws from: rows of ``lengths[n]`` tokens, and a micro-batch of some of
    them.
    """

    lengths: np.ndarray

    def __len__(self) -> int: ...
    def collate(self, indices: np.ndarray) -> Batch: ...


class TokenSamples:
    """Samples for a causal model: ``samples[n]`` is ``(ids, learned)``, two numpy arrays of length
    ``lengths[n]``.
    """

    pad_id: int
    bytes_of: np.ndarray  # UTF-8 bytes each id stands for

    def collate(self, indices: np.ndarray) -> Batch:
        """Right-pad the chosen samples to the longest of them."""
        rows = [self[int(index)] for index in indices]
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), longest), self.pad_id, dtype=torch.int64)
        labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
        n_bytes = 0
        for row, (ids, learned) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            targets = np.where(learned, ids.astype(np.int64), IGNORED)
            targets[0] = IGNORED
            labels[row, : len(ids)] = torch.from_numpy(targets)
            n_bytes += int(self.bytes_of[targets[targets != IGNORED]].sum())
        n_tokens = sum(len(ids) for ids, _ in rows)
        return Batch(
            {"input_ids": input_ids}, labels, int((labels != IGNORED).sum()), n_bytes, n_tokens
        )


class PretrainSamples(TokenSamples):
    """Documents laid end to end and cut into windows of ``max_seq_len`` tokens: no padding, nothing
    dropped.

    Neighbouring windows share one token, so that every token but the very first is predicted
    exactly once.
    """

    def __init__(self, rows: TokenRows, max_seq_len: int, pad_id: int, bytes_of: np.ndarray):
        self.rows, self.max_seq_len, self.pad_id, self.bytes_of = (
            rows,
            max_seq_len,
            pad_id,
            bytes_of,
        )
        self._ends = np.cumsum(rows.lengths, dtype=np.int64)  # of each document in the stream
        tokens = int(self._ends[-1]) if len(rows) else 0
        count = -(-max(tokens - 1, 0) // (max_seq_len - 1))
        self.lengths = np.full(count, max_seq_len, np.int32)
        self.lengths[-1:] = tokens - (count - 1) * (max_seq_len - 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = index * (self.max_seq_len - 1)
        end = start + int(self.lengths[index])
        first, last = np.searchsorted(self._ends, (start, end - 1), side="right")
        pieces = []
        for row in range(int(first), int(last) + 1):
            begin = int(self._ends[row]) - int(self.rows.lengths[row])
            pieces.append((row, max(start - begin, 0), end - begin))
        ids = np.concatenate([self.rows.ids(*piece) for piece in pieces])
        return ids, np.concatenate([self.rows.learned(*piece) for piece in pieces])

    def describe(self) -> str:
        return f"{len(self.rows)} documents, {int(self.rows.lengths.sum())} tokens, {len(self)} windows, 0 % truncated"


class ChatSamples(TokenSamples):
    """Chats cut after ``max_seq_len`` tokens; one whose cut leaves nothing to learn is left out and
    counted.
    """

    def __init__(self, rows: TokenRows, max_seq_len: int, pad_id: int, bytes_of: np.ndarray):
        self.max_seq_len, self.pad_id, self.bytes_of = max_seq_len, pad_id, bytes_of
        self.truncated = int((rows.lengths > max_seq_len).sum())
        kept = np.flatnonzero(rows.first_target < max_seq_len)
        self.without_targets = len(rows) - len(kept)
        self.rows = TokenRows(rows.table, rows.chosen[kept])
        self.lengths = np.minimum(self.rows.lengths, max_seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows.ids(index)[: self.max_seq_len], self.rows.learned(index)[
            : self.max_seq_len
        ]

    def describe(self) -> str:
        total = len(self) + self.without_targets
        cut = f"{100 * self.truncated / max(total, 1):.1f} % truncated at {self.max_seq_len}"
        left_out = (
            f", {self.without_targets} left out: nothing to learn" if self.without_targets else ""
        )
        return f"{len(self)} chats, {int(self.lengths.sum())} tokens, {cut}{left_out}"


class PretrainDataset:
    """Training and validation windows of pretraining files: ``train`` and ``val``."""

    kind, samples = TEXT, PretrainSamples

    def __init__(
        self,
        paths: tuple[Path, ...],
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        *,
        cache: Path,
        val_ratio: float = 0.02,
        bad_rows: str = "stop",
    ):
        table = tokenize_files(paths, self.kind, tokenizer, cache, bad_rows)
        sizes = token_bytes(tokenizer)
        self.train, self.val = (
            self.samples(rows, max_seq_len, tokenizer.pad_token_id or 0, sizes)
            for rows in split_rows(table, val_ratio)
        )
        if not len(self.train):
            raise UserError(
                f"--max_seq_len {max_seq_len} leaves nothing to learn in {', '.join(map(str, paths))}"
            )


class SFTDataset(PretrainDataset):
    """Training and validation chats of fine-tuning files: ``train`` and ``val``."""

    kind, samples = CHAT, ChatSamples


class Batches:
    """The optimizer steps of each epoch, in an order that depends on ``seed`` and epoch alone (a
    ``BatchSource``).

    A step takes ``rows_per_step`` samples of like length, so that little is padding: the shuffled
    samples are cut into pools of ``POOL`` steps, sorted by length within each, and the steps are
    shuffled again. An epoch uses every sample once; one of its steps may be smaller. Process
    ``rank`` of ``world_size`` gets its share of each step's samples, at least one micro-batch of
    them: a fully masked one where samples are too few, or too unequal, for all processes.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        accumulation_steps: int,
        seed: int,
        num_workers: int = 0,
        *,
        micro_tokens: int = MICRO_TOKENS,
        rank: int = 0,
        world_size: int = 1,
        rows_per_step: int | None = None,
    ):
        self.samples, self.batch_size, self.micro_tokens, self.seed = (
            samples,
            batch_size,
            micro_tokens,
            seed,
        )
        self.num_workers, self.rank, self.world_size = num_workers, rank, world_size
        self.rows_per_step = rows_per_step or batch_size * accumulation_steps * world_size
        self.steps_per_epoch = -(-len(samples.lengths) // self.rows_per_step)

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """This process' micro-batches, one list a step, from step ``start`` of the epoch on."""
        # A generator of its own: the loader draws a seed, which would shift dropout after a resume
        # within an epoch.
        settings = {
            "num_workers": self.num_workers,
            "collate_fn": self._caught,
            "generator": torch.Generator(),
        }
        remaining = range(start, self.steps_per_epoch)
        for step in started(
            DataLoader(self._plan(epoch), batch_size=None, sampler=remaining, **settings)
        ):
            if isinstance(step, UserError):
                raise step
            yield step

    def largest_batch(self) -> Batch:
        """The micro-batch of the epoch with most tokens, padding included."""
        plan = self._plan(0)
        parts = [
            p
            for n in range(self.steps_per_epoch)
            for p in micro_batches(
                self.samples, self._share(plan[n]), self.batch_size, self.micro_tokens
            )
        ]
        return self.samples.collate(
            max(parts, key=lambda p: len(p) * int(self.samples.lengths[p].max()))
        )

    def useful_share(self, epoch: int = 0) -> float:
        """Tokens that are no padding / all tokens computed, over the whole epoch of this
        process.
        """
        useful = padded = 0
        for indices in map(self._plan(epoch).__getitem__, range(self.steps_per_epoch)):
            for part in micro_batches(
                self.samples, self._share(indices), self.batch_size, self.micro_tokens
            ):
                lengths = self.samples.lengths[part]
                useful, padded = (
                    useful + int(lengths.sum()),
                    padded + len(part) * int(lengths.max()),
                )
        return useful / padded

    def _plan(self, epoch: int) -> "_Plan":
        rng = np.random.default_rng([self.seed, epoch])
        lengths, pool = self.samples.lengths, POOL * self.rows_per_step
        order = rng.permutation(len(lengths))
        for begin in range(0, len(order), pool):
            part = order[begin : begin + pool]
            # Blurred by a tenth, or small data sets would meet in the same batches every epoch.
            order[begin : begin + pool] = part[
                np.argsort(lengths[part] * rng.uniform(1.0, 1.1, len(part)))
            ]
        return _Plan(order, self.rows_per_step, rng.permutation(self.steps_per_epoch))

    def _share(self, indices: np.ndarray) -> np.ndarray:
        """Neighbours by length, so that little is padding, and as many tokens for each process as
        can be.
        """
        longest_first = indices[np.argsort(-self.samples.lengths[indices], kind="stable")]
        ends = np.cumsum(self.samples.lengths[longest_first])
        middles = ends - self.samples.lengths[longest_first] / 2
        return longest_first[(middles * self.world_size / ends[-1]).astype(np.int64) == self.rank]

    def _caught(self, indices: np.ndarray) -> list[Batch] | UserError:
        """Raised in a loader's process, the sentence would come in a traceback, which keeps that
        process alive.
        """
        try:
            return self._step(indices)
        except UserError as error:
            return error

    def _step(self, indices: np.ndarray) -> list[Batch]:
        share = self._share(indices)
        if not len(share):
            return [masked(self.samples.collate(indices[:1]))]
        parts = micro_batches(self.samples, share, self.batch_size, self.micro_tokens)
        return [self.samples.collate(part) for part in parts]


@dataclass
class _Plan:
    """The samples of each step of an epoch: consecutive ``rows`` of ``order``, the steps shuffled
    by ``turn``.
    """

    order: np.ndarray
    rows: int
    turn: np.ndarray

    def __getitem__(self, step: int) -> np.ndarray:
        first = int(self.turn[step]) * self.rows
        return self.order[first : first + self.rows]


def micro_batches(
    samples: Samples, indices: np.ndarray, batch_size: int, micro_tokens: int = MICRO_TOKENS
) -> list[np.ndarray]:
    """Cut the chosen samples into micro-batches, the longest first, in the way that costs least.

    A micro-batch has at most ``batch_size`` samples and ``micro_tokens`` tokens, padding included
    (or one sample). It costs its padded tokens and, for starting it, ``micro_tokens / PASS_COST``
    more.
    """
    indices = indices[np.argsort(-samples.lengths[indices], kind="stable")]
    lengths, count = samples.lengths[indices], len(indices)
    cost, cut = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    for end in range(
        1, count + 1
    ):  # the cheapest way to cut the first ``end``: its last part begins at cut[end]
        begin = np.arange(max(0, end - batch_size), end)
        padded = (end - begin) * lengths[begin]
        fits = (padded <= micro_tokens) | (begin == end - 1)
        totals = np.where(fits, cost[begin] + padded + micro_tokens / PASS_COST, np.inf)
        cost[end], cut[end] = totals.min(), begin[totals.argmin()]
    parts = []
    while count:
        parts.insert(0, indices[cut[count] : count])
        count = int(cut[count])
    return parts


def masked(batch: Batch) -> Batch:
    """The same shapes without anything to learn or to count."""
    return Batch(
        batch.inputs, torch.full_like(batch.labels, IGNORED), n_targets=0, n_bytes=0, n_tokens=0
    )


def validation_batches(
    samples: Samples, batch_size: int, max_tokens: int, micro_tokens: int = MICRO_TOKENS
) -> list[Batch]:
    """About ``max_tokens`` tokens of samples spread evenly over all (files follow one another), as
    batches.
    """
    if not len(samples):
        return []
    count = max(1, min(len(samples), len(samples) * max_tokens // int(samples.lengths.sum())))
    spread = np.linspace(0, len(samples) - 1, count).round().astype(np.int64)
    return [
        samples.collate(part) for part in micro_batches(samples, spread, batch_size, micro_tokens)
    ]
