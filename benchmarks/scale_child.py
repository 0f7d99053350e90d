"""A start on prepared data, as a training door makes it, timed without the imports.

python benchmarks/scale_child.py DATA_FILE --out_dir OUT_DIR   (prints one line of JSON)
"""

import json
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: F401 - the doors' imports, before the clock starts
import torch  # noqa: F401
from transformers import AutoTokenizer  # noqa: F401

from core.paths import TOKENIZER_DIR, cache_dir
from dataset.batches import Batches, PretrainDataset
from dataset.tokenizer import load_tokenizer
from train_pretrain import Options
from trainer.stage import run_facts

DRAWN = 300


def main(path: Path, out_dir: Path) -> None:
    began = time.perf_counter()
    options = Options(data_path=(path,), out_dir=out_dir)
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    data = PretrainDataset((path,), tokenizer, options.max_seq_len, cache=cache_dir(out_dir))
    opened = time.perf_counter()
    batches = Batches(data.train, options.batch_size, 1, options.seed).steps(0)
    next(batches)
    first = time.perf_counter()
    run_facts("pretrain", options, tokenizer)
    recorded = time.perf_counter()
    drawn = sum(1 for _ in islice(batches, DRAWN))
    milliseconds = 1000 * (time.perf_counter() - recorded) / max(drawn, 1)
    lengths = [samples.rows.lengths for samples in (data.train, data.val)]
    figures = {
        "rows": sum(map(len, lengths)),
        "tokens": sum(int(part.sum()) for part in lengths),
        "seconds_to_first_batch": round(first - began, 3),
        "of_it_data_opened": round(opened - began, 3),
        "seconds_of_run_record": round(recorded - first, 3),
        "ms_per_batch_drawn": round(milliseconds, 3),
        "batches_drawn": drawn,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[3]))
