"""From tokenised rows to the micro-batches of optimizer steps."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from dataset.cache import CHAT, TEXT, TokenRows, split_rows, tokenize_files
from dataset.tokenizer import token_bytes
from dataset.workers import by_workers

MICRO_TOKENS = 2048  # of one pass: a CPU is no faster with more, and needs more memory
PASS_COST = 1 / 64  # starting a pass takes this share of the time of the largest one
POOL = 50  # steps sorted by length together: enough for little padding, few enough to stay random
PROBED = 100  # steps of an epoch that are cut to find the largest micro-batch
IGNORED = -100  # the label of a position that is not learned, PyTorch's own default
# What a batch is for: to learn its rows, or to keep what the model says to them.
KINDS = OWN, KEEP = "own", "keep"


@dataclass
class Batch:
    """One micro-batch.

    ``labels`` (B, T) int64 are unshifted: the id itself where it is learned, else -100. The model
    predicts ``labels[:, t + 1]`` at t, and nothing predicts ``labels[:, 0]``, which is -100. The
    loss of a step is the sum, over the kinds, of the kind's mean over its targets times ``weight``.
    """

    inputs: dict[str, Tensor]  # for the model's forward: ``input_ids`` (B, T) int64, right-padded
    labels: Tensor
    n_targets: int  # labels that are learned
    n_bytes: int  # UTF-8 bytes that those stand for
    n_tokens: int  # ids that are not padding
    kind: str = OWN  # one of ``KINDS``
    weight: float = 1.0
    reference: Tensor | None = None  # of pairs: (B,) fp64 on the CPU, see ``PairSamples``


class Samples(Protocol):
    """What ``Batches`` draws from: sample ``n`` has ``lengths[n]`` tokens, (samples,) int."""

    lengths: np.ndarray

    def collate(self, indices: np.ndarray) -> Batch: ...


@dataclass(eq=False)
class TokenSamples:
    """Samples of a causal model; subclasses give ``lengths`` and ``self[n]``.

    A sample is an integer array of ``2 * id + learned`` per token, as in the token table.
    """

    rows: TokenRows
    max_seq_len: int
    pad_id: int
    bytes_of: np.ndarray  # UTF-8 bytes each id stands for

    def digests(self) -> list[int]:
        """What ``digest`` makes of each row."""
        return self.rows.rows["digest"][self.rows.chosen].tolist()

    def only(self, digests: Iterable[int]) -> "TokenSamples":
        """The samples of the rows with these ``digests``."""
        rows, wanted = self.rows, set(digests)
        is_wanted = np.array([each in wanted for each in self.digests()], bool)
        return replace(self, rows=TokenRows(rows.table, rows.dtype, rows.chosen[is_wanted]))

    def without(self, digests: Iterable[int]) -> "TokenSamples":
        """The samples of the other rows."""
        return self.only(set(self.digests()).difference(digests))

    def with_half(self, others: Iterable["TokenSamples"]) -> "TokenSamples":
        """These and, half as often as these, each of the ``others``, which are of the same table.

        All rows are there; whichever are too few are repeated.
        """
        own, parts = self.rows.chosen, [each.rows.chosen for each in others]
        parts = [each for each in parts if len(each)]
        half = max(len(own) // 2, *map(len, parts), 1)
        chosen = [np.resize(own, max(len(own), 2 * half)), *(np.resize(p, half) for p in parts)]
        rows = TokenRows(self.rows.table, self.rows.dtype, np.concatenate(chosen))
        return replace(self, rows=rows)

    def split(self, val_ratio: float) -> tuple["TokenSamples", "TokenSamples"]:
        """Those to train on and those held out, as ``split_rows`` divides their rows."""
        train, val = split_rows(self.rows, val_ratio)
        return replace(self, rows=train), replace(self, rows=val)

    def collate(self, indices: np.ndarray) -> Batch:
        """Right-pad the chosen samples to the longest of them."""
        return self.padded([self[int(index)] for index in indices])

    def padded(self, chosen: list[np.ndarray]) -> Batch:
        """A batch of these samples."""
        tokens = np.full((len(chosen), max(map(len, chosen))), 2 * self.pad_id, np.int64)
        for n, row in enumerate(chosen):
            tokens[n, : len(row)] = row
        ids, learned = tokens >> 1, tokens % 2 == 1  # padding is even: not learned
        learned[:, 0] = False  # nothing predicts the first token
        labels = torch.from_numpy(np.where(learned, ids, IGNORED))
        counts = int(learned.sum()), int(self.bytes_of[ids[learned]].sum()), sum(map(len, chosen))
        return Batch({"input_ids": torch.from_numpy(ids)}, labels, *counts)


@dataclass(eq=False)
class ChatSamples(TokenSamples):
    """Chats cut after ``max_seq_len`` tokens, without those that have nothing left to learn."""

    def __post_init__(self):
        lengths = np.minimum(self.rows.lengths, self.max_seq_len)
        self._kept = np.flatnonzero(self.rows.first_target < lengths)  # something is left to learn
        self.lengths = lengths[self._kept]

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[int(self._kept[index])][: self.max_seq_len]

    def describe(self) -> str:
        kept, lengths = len(self._kept), self.rows.lengths
        share = 100 * (lengths > self.max_seq_len).sum() / max(len(lengths), 1)
        counts = f"{kept} chats, {int(self.lengths.sum())} tokens"
        found = f"{counts}, {share:.1f} % truncated at {self.max_seq_len}"
        left_out = len(lengths) - kept
        return f"{found}, {left_out} left out: nothing to learn" if left_out else found


@dataclass(eq=False)
class PretrainSamples(TokenSamples):
    """Documents laid end to end and cut into windows of ``max_seq_len`` tokens, without padding.

    Nothing is dropped, and neighbouring windows share one token, so that every token but the very
    first is predicted exactly once.
    """

    def __post_init__(self):
        self._ends = np.cumsum(self.rows.lengths, dtype=np.int64)  # of each document in the stream
        tokens, stride = int(self._ends[-1]) if len(self._ends) else 0, self.max_seq_len - 1
        count = -(-max(tokens - 1, 0) // stride)
        self.lengths = np.full(count, self.max_seq_len, np.int32)
        self.lengths[-1:] = tokens - (count - 1) * stride

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * (self.max_seq_len - 1)
        end = start + int(self.lengths[index])
        first, last = np.searchsorted(self._ends, (start, end - 1), side="right")
        pieces = []
        for row in range(int(first), int(last) + 1):
            begin = int(self._ends[row]) - int(self.rows.lengths[row])
            pieces.append(self.rows[row][max(start - begin, 0) : end - begin])
        return np.concatenate(pieces)

    def describe(self) -> str:
        counts = f"{len(self._ends)} documents, {int(self.rows.lengths.sum())} tokens"
        return f"{counts}, {len(self.lengths)} windows, 0 % truncated"


class PretrainDataset:
    """Training and validation windows of pretraining files: ``train`` and ``val``.

    ``cache`` is the folder of token tables. Raises ``UserError`` if nothing is left to train on,
    and as ``tokenize_files`` and ``split_rows`` do.
    """

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
        control_text: str = "keep",
    ):
        rows = tokenize_files(paths, self.kind, tokenizer, cache, bad_rows, control_text)
        settings = max_seq_len, tokenizer.pad_token_id or 0, token_bytes(tokenizer)
        train, val = split_rows(rows, val_ratio)
        self.train, self.val = self.samples(train, *settings), self.samples(val, *settings)
        if not len(self.train.lengths):
            names = ", ".join(map(str, paths))
            raise UserError(f"nothing is left to learn in {names} within max_seq_len {max_seq_len}")


class SFTDataset(PretrainDataset):
    """Training and validation chats of fine-tuning files: ``train`` and ``val``."""

    kind, samples = CHAT, ChatSamples


@dataclass(eq=False)
class Batches:
    """The optimizer steps of each epoch; their order follows from lengths, seed and epoch alone.

    A step takes ``rows_per_step`` samples of like length, so that little is padding: the shuffled
    samples are cut into pools of ``POOL`` steps, sorted by length within each, and the steps are
    shuffled again. An epoch uses every sample once; one of its steps may be smaller. Process
    ``rank`` of ``world_size`` gets its share of each step, or a fully masked micro-batch.
    """

    samples: Samples
    batch_size: int
    accumulation_steps: int
    seed: int
    num_workers: int = 0
    _: KW_ONLY
    micro_tokens: int = MICRO_TOKENS
    rank: int = 0
    world_size: int = 1
    rows_per_step: int = 0  # 0: batch_size * accumulation_steps * world_size

    def __post_init__(self):
        if not self.rows_per_step:
            self.rows_per_step = self.batch_size * self.accumulation_steps * self.world_size
        self.steps_per_epoch = -(-len(self.samples.lengths) // self.rows_per_step)

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """This process' micro-batches, one list a step, from step ``start`` of the epoch on."""
        planned = self._planned(epoch, start)
        if self.num_workers:
            return by_workers(self._collated, planned, self.num_workers)
        return map(self._collated, planned)

    def largest_batches(self) -> list[Batch]:
        """The largest micro-batch, padding included, of an epoch's ``PROBED`` fullest steps."""
        lengths = self.samples.lengths
        most_tokens = lengths * np.clip(self.micro_tokens // lengths, 1, self.batch_size)
        steps = heapq.nlargest(PROBED, self._planned(0), key=lambda step: most_tokens[step].max())
        parts = [part for step in steps for part in self._cut(step)] or [steps[0][:1]]
        largest = max(parts, key=lambda part: len(part) * lengths[part].max())
        return [self.samples.collate(largest)]

    def useful_share(self, epoch: int = 0) -> float:
        """Tokens that are not padding / all tokens computed, in this process' whole epoch."""
        lengths, steps = self.samples.lengths, self._planned(epoch)
        parts = [lengths[part] for step in steps for part in self._cut(step)]
        padded = sum(len(part) * int(part.max()) for part in parts)
        return sum(int(part.sum()) for part in parts) / padded

    def _planned(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """The samples of each step of an epoch, those of all processes, from step ``start`` on."""
        rng = np.random.default_rng([self.seed, epoch])
        lengths, per_step = self.samples.lengths, self.rows_per_step
        order = rng.permutation(len(lengths))
        for begin in range(0, len(order), POOL * per_step):
            pool = order[begin : begin + POOL * per_step]
            # In place. Lengths are blurred by a tenth, lest small data repeat batches each epoch.
            pool[:] = pool[np.argsort(lengths[pool] * rng.uniform(1.0, 1.1, len(pool)))]
        for step in rng.permutation(self.steps_per_epoch)[start:]:  # resumed: the rest of the order
            yield order[step * per_step : (step + 1) * per_step]

    def _cut(self, step: np.ndarray) -> list[np.ndarray]:
        """Cut this process' share of a step, about as many tokens as any other's, into parts."""
        lengths = self.samples.lengths
        longest_first = step[np.argsort(-lengths[step], kind="stable")]
        ends = np.cumsum(lengths[longest_first])
        middles = ends - lengths[longest_first] / 2
        ranks = (middles * self.world_size / ends[-1]).astype(np.int64)  # equal shares of tokens
        share = longest_first[ranks == self.rank]
        return micro_batches(lengths, share, self.batch_size, self.micro_tokens)

    def _collated(self, step: np.ndarray) -> list[Batch]:
        batches = [self.samples.collate(part) for part in self._cut(step)]
        return batches or [masked(self.samples.collate(step[:1]))]  # every rank needs a pass


@dataclass(eq=False)
class KeepingBatches:
    """The steps of ``own``, each with a step of ``general`` of the kind ``KEEP`` after it.

    The general rows follow from the number of the step in the whole run alone.
    """

    own: Batches
    general: Batches
    weight: float

    def __post_init__(self):
        self.steps_per_epoch, self.rows_per_step = self.own.steps_per_epoch, self.own.rows_per_step

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """This process' micro-batches, one list a step, from step ``start`` of the epoch on."""
        general = self._kept_from(epoch * self.steps_per_epoch + start)
        for own, kept in zip(self.own.steps(epoch, start), general, strict=False):
            yield own + [self._as_kept(batch) for batch in kept]

    def largest_batches(self) -> list[Batch]:
        """The largest micro-batch of either kind, as ``Batches`` finds it."""
        kept = self.general.largest_batches()
        return self.own.largest_batches() + [self._as_kept(batch) for batch in kept]

    def _kept_from(self, step: int) -> Iterator[list[Batch]]:
        """General steps without end, from that of ``step`` on."""
        epoch, start = divmod(step, self.general.steps_per_epoch)
        while True:
            yield from self.general.steps(epoch, start)
            epoch, start = epoch + 1, 0

    def _as_kept(self, batch: Batch) -> Batch:
        return replace(batch, kind=KEEP, weight=self.weight)


def micro_batches(
    lengths: np.ndarray, indices: np.ndarray, batch_size: int, micro_tokens: int = MICRO_TOKENS
) -> list[np.ndarray]:
    """Cut the samples ``indices`` into micro-batches, longest first, in the way that costs least.

    Each has at most ``batch_size`` samples and ``micro_tokens`` tokens, padding included; a longer
    sample is alone. A part costs its padded tokens, and ``micro_tokens * PASS_COST`` to start it.
    """
    longest_first = indices[np.argsort(-lengths[indices], kind="stable")]
    sorted_lengths = lengths[longest_first]
    # cost[end]: of the first ``end`` samples, cut best; starts[end]: where their last part starts.
    cost, starts = np.zeros(len(indices) + 1), np.zeros(len(indices) + 1, np.int64)
    for end in range(1, len(indices) + 1):
        begin = np.arange(max(0, end - batch_size), end)
        padded = (end - begin) * sorted_lengths[begin]  # the first sample of a part is its longest
        fits = (padded <= micro_tokens) | (begin == end - 1)
        totals = np.where(fits, cost[begin] + padded + micro_tokens * PASS_COST, np.inf)
        cost[end], starts[end] = totals.min(), begin[totals.argmin()]
    parts, end = [], len(indices)
    while end > 0:
        parts.append(longest_first[starts[end] : end])
        end = int(starts[end])
    return parts[::-1]


def masked(batch: Batch) -> Batch:
    """The same shapes with nothing to learn and nothing to count."""
    labels = torch.full_like(batch.labels, IGNORED)
    return replace(batch, labels=labels, n_targets=0, n_bytes=0, n_tokens=0)


def validation_batches(
    samples: Samples, batch_size: int, max_tokens: int, micro_tokens: int = MICRO_TOKENS
) -> list[Batch]:
    """Batches of about ``max_tokens`` tokens, of samples spread evenly over all files."""
    total = len(samples.lengths)
    if not total:
        return []
    count = max(1, min(total, total * max_tokens // int(samples.lengths.sum())))
    spread = np.linspace(0, total - 1, count).round().astype(np.int64)
    parts = micro_batches(samples.lengths, spread, batch_size, micro_tokens)
    return [samples.collate(part) for part in parts]
