"""What counting alone achieves: a token trigram on the very windows a pretraining run saw and was
validated on.

python benchmarks/trigram.py --data_path a.jsonl --steps 500 --batch_size 4   (the run's own flags)
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse, require
from core.paths import TOKENIZER_DIR, bundled_data, cache_dir

DISCOUNT = 0.75  # of absolute discounting (Ney, Essen & Kneser 1994), the usual value
ADDED = 0.1  # to each unigram count, so that no token is impossible


@dataclass
class Options:
    """Bits per byte of an interpolated token trigram, trained and scored on what train_pretrain.py
    would use.
    """

    data_path: tuple[Path, ...] = option(
        (bundled_data("pretrain_mini.jsonl"),), "pretraining files"
    )
    out_dir: Path = option(Path("out"), "folder whose cache holds the tokenised data")
    tokenizer_path: Path = option(TOKENIZER_DIR, "tokenizer folder")
    max_seq_len: int = option(512, "tokens of a window")
    batch_size: int = option(16, "windows of an optimizer step")
    steps: int = option(0, "train on the windows of so many steps; 0: all")
    seed: int = option(1337, "order of the windows")
    val_ratio: float = option(0.02, "share of rows held out")
    val_tokens: int = option(16384, "how many held-out tokens are scored")
    result: Path | None = option(None, "also write the figures to this JSON file")

    def __post_init__(self):
        require(self.steps >= 0, f"--steps {self.steps} must not be negative")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    import numpy as np

    from benchmarks.result_file import measured_on, write_results
    from dataset.batches import Batches, PretrainDataset, validation_batches
    from dataset.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer_path)
    data = PretrainDataset(
        options.data_path,
        tokenizer,
        options.max_seq_len,
        cache=cache_dir(options.out_dir),
        val_ratio=options.val_ratio,
    )
    batches = Batches(data.train, options.batch_size, 1, options.seed)
    used = options.steps or batches.steps_per_epoch
    windows = [
        batch.inputs["input_ids"].numpy()
        for _, step in zip(range(used), batches.steps(0), strict=False)
        for batch in step
    ]
    model = Trigram(windows, len(tokenizer))
    nats, n_bytes = 0.0, 0
    for batch in validation_batches(data.val, options.batch_size, options.val_tokens):
        labels = batch.labels.numpy()
        is_text = (labels != -100) & ~np.isin(labels, tokenizer.all_special_ids)
        for ids, wanted in zip(batch.inputs["input_ids"].numpy(), is_text, strict=True):
            nats -= sum(
                math.log(model.probability(ids[:t], int(ids[t]))) for t in np.flatnonzero(wanted)
            )
        n_bytes += batch.n_bytes
    figures = {
        "training_tokens": int(sum(window.size for window in windows)),
        "bits_per_byte": round(nats / math.log(2) / n_bytes, 4),
        "bytes": n_bytes,
        **measured_on(("torch", "tokenizers")),
    }
    print(json.dumps(figures, indent=2))
    write_results(options.result, figures)
    return figures


class Trigram:
    """Trigram over bigram over unigram, interpolated by absolute discounting: probabilities sum to
    one.
    """

    def __init__(self, windows: list, vocabulary: int):
        import numpy as np

        self.vocabulary = vocabulary
        # n-grams as one integer each: sorted arrays of what occurred, and how often.
        unigrams = np.concatenate([window.ravel() for window in windows])
        pairs = np.concatenate(
            [(window[:, :-1] * vocabulary + window[:, 1:]).ravel() for window in windows]
        )
        triples = np.concatenate(
            [
                ((w[:, :-2] * vocabulary + w[:, 1:-1]) * vocabulary + w[:, 2:]).ravel()
                for w in windows
                if w.shape[1] > 2
            ]
        )
        self.total = len(unigrams)
        self.tables = [np.unique(grams, return_counts=True) for grams in (unigrams, pairs, triples)]

    def probability(self, context, token: int) -> float:
        """Of ``token`` after the ids ``context``, of which the last two count."""
        vocabulary = self.vocabulary
        probability = (self._count(0, token) + ADDED) / (self.total + ADDED * vocabulary)
        prefix = 0
        for order, earlier in enumerate(context[-2:][::-1], 1):
            prefix += int(earlier) * vocabulary ** (order - 1)
            seen, kinds = self._continuations(order, prefix)
            if not seen:
                break
            count = self._count(order, prefix * vocabulary + token)
            probability = max(count - DISCOUNT, 0.0) / seen + DISCOUNT * kinds / seen * probability
        return probability

    def _count(self, order: int, gram: int) -> int:
        import numpy as np

        grams, counts = self.tables[order]
        at = int(np.searchsorted(grams, gram))
        return int(counts[at]) if at < len(grams) and grams[at] == gram else 0

    def _continuations(self, order: int, prefix: int) -> tuple[int, int]:
        """How often ``prefix`` was followed by anything, and by how many different tokens."""
        import numpy as np

        grams, counts = self.tables[order]
        start, end = np.searchsorted(
            grams, (prefix * self.vocabulary, (prefix + 1) * self.vocabulary)
        )
        return int(counts[start:end].sum()), int(end - start)


if __name__ == "__main__":
    run(main)
