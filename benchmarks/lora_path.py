"""How much somebody who follows the LoRA path has to read: python benchmarks/lora_path.py

Traces ``train_lora.main`` for three steps, from a JSONL line to the ``.pth``, with a cold token
cache, and counts what ran of this repository: all threads, but no module level, no class body and
no generated code.
"""

import inspect
import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.result_file import measured_on, write_results
from core.errors import run
from core.options import option, parse

SMALL = "--device cpu --max_seq_len 128 --batch_size 8"
# Two processes of their own make the base, so that nothing on the path is warm.
BASE = (
    f"train_pretrain.py {SMALL} --max_steps 1 --dim 64 --n_layers 2 --n_heads 4",
    f"train_full_sft.py {SMALL} --max_steps 1",
)
SKILL = f"{SMALL} --max_steps 3 --num_workers 0"


@dataclass
class Options:
    """Trace three steps of train_lora.py; print files, executed lines and functions on the way."""

    functions: bool = option(False, "also list the functions in the order of their first calls")
    result: Path | None = option(None, "write the figures to this JSON file")


class Tracer:
    """Collects the functions of this repository that run, and their lines."""

    def __init__(self):
        self.lines: set[tuple[str, int]] = set()
        self.functions: dict[CodeType, None] = {}  # in the order of their first calls

    def __call__(self, frame: FrameType, event: str, _: object):
        code = frame.f_code
        if code not in self.functions:
            ours = code.co_filename.startswith(f"{ROOT}/") and "/.venv/" not in code.co_filename
            if not ours or not code.co_flags & inspect.CO_OPTIMIZED:  # a module or a class body
                return None
            self.functions[code] = None
        if event == "line":
            self.lines.add((code.co_filename, frame.f_lineno))
        return self

    def figures(self) -> dict[str, int]:
        """``function_lines``: of the functions that ran, docstrings and signatures included.

        ``file_changes``: first calls that lead into another file than the first call before.
        """
        order = [code.co_filename for code in self.functions]
        read = set()
        for code in self.functions:
            lines, first = inspect.getsourcelines(code)
            read |= {(code.co_filename, first + n) for n in range(len(lines))}
        return {
            "files": len(set(order)),
            "file_lines": sum(len(Path(name).read_bytes().splitlines()) for name in set(order)),
            "function_lines": len(read),
            "executed_lines": len(self.lines),
            "functions": sum(not code.co_name.startswith("<") for code in self.functions),
            "file_changes": sum(a != b for a, b in pairwise(order)),
        }


def main(argv: list[str] | None = None) -> dict[str, int]:
    options = parse(Options, argv)
    with tempfile.TemporaryDirectory() as out:
        for command in BASE:
            door, *flags = command.split()
            words = [sys.executable, str(ROOT / door), *flags, "--out_dir", out]
            subprocess.run(words, check=True, capture_output=True)
        tracer = traced_training(["--out_dir", out, *SKILL.split()])
    if options.functions:
        for code in tracer.functions:
            place = Path(code.co_filename).relative_to(ROOT)
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has the short name
            print(f"{place}:{code.co_firstlineno} {name}")
    figures = tracer.figures()
    print(json.dumps(figures))
    write_results(options.result, figures | measured_on(("torch",)))
    return figures


def traced_training(flags: list[str]) -> Tracer:
    """A run of ``train_lora.main`` under a tracer; the imports it makes are on nobody's path."""
    import train_lora

    tracer = Tracer()
    threading.settrace(tracer)
    sys.settrace(tracer)
    try:
        train_lora.main(flags)
    finally:
        sys.settrace(None)
        threading.settrace(None)
    return tracer


if __name__ == "__main__":
    run(main)
