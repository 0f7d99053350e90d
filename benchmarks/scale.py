"""What gigabytes of data cost: preparing them, starting on them, and the memory of training on
them. Linux only.

python benchmarks/scale.py --sizes 0.5 2 --folder /tmp/scale   (needs about twice the largest size
there)

Memory is resident anonymous memory (``RssAnon``): what a process holds for itself. Resident pages
of mapped files (``RssFile``) are the system's cache of the table, given back when others need room;
they are listed apart.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError, run
from core.options import option, parse, require
from core.paths import REPOSITORY, bundled_data

TRAIN = "train_pretrain.py --max_steps 3 --val_tokens 4096 --batch_size 4 --device cpu --data_path"
PREPARE = "scripts/prepare_data.py"
SPEED_GB = 0.05  # whose tokenising is timed in several ways
ROUNDS = 3
LENGTHS = (1, 1, 2, 4, 8, 16)  # bundled texts in a document


@dataclass
class Options:
    """Time and memory of preparing, starting and training on generated files of several sizes."""

    sizes: tuple[float, ...] = option(
        (0.5, 2.0), "gigabytes (10^9 bytes) of the generated files, ascending"
    )
    folder: Path = option(
        Path("out/scale"), "where to generate and train; a file already there is used"
    )
    result: Path = option(
        REPOSITORY / "benchmarks" / "results" / "scale.json", "file of the figures"
    )

    def __post_init__(self):
        require(min(self.sizes) > 0, f"--sizes {min(self.sizes)} must be positive")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    from benchmarks.result_file import measured_on, write_results

    if not Path("/proc/self/status").is_file():
        raise UserError("memory is read from /proc, which only Linux has; run the benchmark there")
    options.folder.mkdir(parents=True, exist_ok=True)
    tiny = options.folder / "tiny.jsonl"
    shutil.copyfile(bundled_data("pretrain_mini.jsonl"), tiny)
    sample_file = generated(options.folder / f"{SPEED_GB:g}gb.jsonl", SPEED_GB)
    figures: dict = {"tiny": measure(tiny, options.folder)}
    figures |= {"tokenising": throughput(sample_file, options.folder, figures["tiny"]), "sizes": {}}
    base = figures["tiny"]["training"]["anonymous_mb"]
    for size in options.sizes:
        path = generated(options.folder / f"{size:g}gb.jsonl", size)
        found = measure(path, options.folder)
        found["training"]["anonymous_mb_above_tiny"] = found["training"]["anonymous_mb"] - base
        found["prepare"]["mb_per_second"] = speed(path, found["prepare"], figures["tiny"])
        figures["sizes"][f"{size:g} GB"] = found
    figures |= measured_on(("torch", "tokenizers", "datasets"))
    print(json.dumps(figures, indent=2))
    write_results(options.result, figures)
    return figures


def measure(path: Path, folder: Path) -> dict:
    """Prepare ``path`` afresh, start on it twice, train on it."""
    out = folder / path.stem
    shutil.rmtree(out, ignore_errors=True)
    prepared = watched(PREPARE, path, out)
    kept = ("seconds", "anonymous_mb", "workers_anonymous_mb")
    figures: dict = {
        "mb": round(path.stat().st_size / 1e6, 1),
        "cache_mb": round(sum(file.stat().st_size for file in (out / "cache").iterdir()) / 1e6, 1),
        "prepare": {name: prepared[name] for name in kept},
    }
    (out / "cache" / "sha256.json").unlink(missing_ok=True)
    for kind in ("cold", "warm"):
        if kind == "cold":  # nothing in the system's cache, no hash remembered
            for file in (path, *(out / "cache").iterdir()):
                evict(file)
        found = watched("benchmarks/scale_child.py", path, out)
        said = json.loads(found["said"].splitlines()[-1])
        figures |= {name: said.pop(name) for name in ("rows", "tokens")}
        used = {name: found[name] for name in ("anonymous_mb", "file_mb")}
        figures[f"{kind}_start"] = said | used
    trained = watched(TRAIN, path, out)
    figures["training"] = {name: trained[name] for name in ("seconds", "anonymous_mb", "file_mb")}
    return figures


def throughput(path: Path, folder: Path, tiny: dict) -> dict:
    """Megabytes a second of tokenising one file in three ways, each the best of some rounds in
    turn.

    And processor seconds, imports included, which do not depend on what else the machine does: what
    the one reading and writing process takes of them bounds how many workers can be fed.
    """
    figures: dict = {}
    for _ in range(ROUNDS):
        for name, command, threads in (
            ("one process, one thread", f"{PREPARE} --workers 1", "false"),
            ("one process, the tokenizer's own threads", f"{PREPARE} --workers 1", "true"),
            ("a process for each core", PREPARE, "false"),
        ):
            shutil.rmtree(folder / "speed", ignore_errors=True)
            done = watched(command, path, folder / "speed", threads)
            found = {"mb_per_second": speed(path, done, tiny)}
            found |= {key: done[key] for key in ("cpu_s", "workers_cpu_s")}
            best = figures.get(name, found)
            figures[name] = max(best, found, key=lambda one: one["mb_per_second"])
    return figures


def speed(path: Path, prepared: dict, tiny: dict) -> float:
    """Megabytes a second of preparing ``path`` beyond the tiny file, whose seconds are those of
    the imports.
    """
    more = path.stat().st_size / 1e6 - tiny["mb"]
    return round(more / (prepared["seconds"] - tiny["prepare"]["seconds"]), 2)


def watched(command: str, data: Path, out: Path, threads: str = "true") -> dict:
    """Run a command that ends with its data; its seconds, what it ``said``, and the most memory and
    processor time of it and of its children.

    Pages that forked children share with their parent count for each of them.
    """
    script, *flags = command.split()
    words = [sys.executable, str(REPOSITORY / script), *flags, str(data), "--out_dir", str(out)]
    print("+", *words[1:], flush=True)
    names = ("anonymous_mb", "file_mb", "workers_anonymous_mb", "cpu_s", "workers_cpu_s")
    peaks, began = dict.fromkeys(names, 0), time.perf_counter()
    settings = os.environ | {"TOKENIZERS_PARALLELISM": threads}
    pipes = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8", "env": settings}
    with subprocess.Popen(words, **pipes) as process:
        ended = threading.Event()
        sampler = threading.Thread(target=sample, args=(process.pid, peaks, ended))
        sampler.start()
        said, _ = process.communicate()
        ended.set()
        sampler.join()
    if process.returncode:
        raise UserError(
            f"{' '.join(words)} ended with code {process.returncode}; it says why above"
        )
    return {"seconds": round(time.perf_counter() - began, 2), "said": said, **peaks}


def sample(process: int, peaks: dict, ended: threading.Event) -> None:
    while not ended.wait(0.05):
        workers = children(process)
        anonymous, mapped = memory(process)
        found = {
            "anonymous_mb": anonymous / 1e6,
            "file_mb": mapped / 1e6,
            "cpu_s": cpu_seconds(process),
        }
        found["workers_anonymous_mb"] = sum(memory(worker)[0] for worker in workers) / 1e6
        found["workers_cpu_s"] = sum(map(cpu_seconds, workers))
        for name, value in found.items():
            peaks[name] = max(peaks[name], round(value))


def cpu_seconds(process: int) -> float:
    """Processor time used so far; 0 of a process that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: int) -> tuple[int, int]:
    """Bytes of resident anonymous memory and of resident file pages; 0 of a process that has
    ended.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = dict(line.split(":", 1) for line in lines)
    return tuple(1024 * int(found.get(name, "0").split()[0]) for name in ("RssAnon", "RssFile"))


def children(process: int) -> list[int]:
    try:
        found = [
            task.read_text().split() for task in Path(f"/proc/{process}/task").glob("*/children")
        ]
    except OSError:
        return []
    return [int(child) for some in found for child in some]


def evict(path: Path) -> None:
    """Take a file out of the system's cache."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def generated(path: Path, size: float) -> Path:
    """``size`` gigabytes of documents, each some of the bundled texts: the same ones for the same
    size.
    """
    if path.exists() and path.stat().st_size >= size * 1e9:
        return path
    lines = bundled_data("pretrain_mini.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.dumps(json.loads(line)["text"], ensure_ascii=False)[1:-1] for line in lines]
    rng, written = random.Random(0), 0
    with path.open("wb") as file:
        while written < size * 1e9:
            document = "\\n".join(rng.choices(texts, k=rng.choice(LENGTHS)))
            written += file.write(f'{{"text": "{document}"}}\n'.encode())
    return path


if __name__ == "__main__":
    run(main)
