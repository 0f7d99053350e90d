"""How much there is to read: python benchmarks/size_report.py [--root DIR]"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse, require
from core.paths import REPOSITORY

LONGEST_FUNCTION, LONGEST_LINE = 50, 100
NO_CODE = {"out", "wandb", "shared", "build"}  # beside folders whose name begins with a dot
READING_PATH = re.compile(r"^#+ .*reading path.*$", re.IGNORECASE | re.MULTILINE)
NEXT_HEADING = re.compile(r"^#+ ", re.MULTILINE)
# 1. `model/model.py`: `MiniMindLM` is ..., and so on in further, indented lines
LIST_ITEM = re.compile(r"^\d+\. +`([^`]+)`(.*(?:\n .*)*)", re.MULTILINE)
IN_CODE = re.compile(r"`([^`]+)`")


@dataclass
class Options:
    """Count lines, functions, docstrings and the README's reading path; print them as JSON."""

    root: Path = option(REPOSITORY, "the checkout to count in")

    def __post_init__(self):
        require((self.root / "README.md").is_file(), f"--root {self.root} has no README.md")


def main(argv: list[str] | None = None) -> dict:
    root = parse(Options, argv).root
    product, benchmarks, tests = {}, {}, {}
    for path in python_files(root):
        room = path.relative_to(root).parts[0]
        part = {"benchmarks": benchmarks, "tests": tests}.get(room, product)
        part[path] = path.read_text(encoding="utf-8")
    everything = product | benchmarks | tests
    functions = dict(functions_in(everything, root))
    lengths = {place: node.end_lineno - node.lineno + 1 for place, node in functions.items()}
    longest = max(lengths, key=lengths.get)
    in_product = [node for _, node in functions_in(product, root)]
    documented = sum(docstring_lines(node) for node in in_product)
    figures = {
        "product_lines": lines(product),
        "benchmark_lines": lines(benchmarks),
        "test_lines": lines(tests),
        "product_functions": len(in_product),
        "docstring_lines_a_function": round(documented / len(in_product), 3),
        f"functions_over_{LONGEST_FUNCTION}_lines": sum(
            length > LONGEST_FUNCTION for length in lengths.values()
        ),
        "longest_function": {longest: lengths[longest]},
        f"lines_over_{LONGEST_LINE}_columns": sum(
            len(line) > LONGEST_LINE for text in everything.values() for line in text.splitlines()
        ),
        "reading_path": reading_path(root),
    }
    print(json.dumps(figures, indent=1))
    return figures


def python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not any(name in NO_CODE or name.startswith(".") for name in folders):
            yield path


def lines(files: dict[Path, str]) -> int:
    return sum(len(text.splitlines()) for text in files.values())


def functions_in(files: dict[Path, str], root: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """``file:line name`` and the node of every function, methods and inner ones included."""
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(root).as_posix()}:{node.lineno} {node.name}", node


def docstring_lines(node: ast.FunctionDef) -> int:
    """Lines of the source that the docstring of a function takes, 0 without one."""
    if ast.get_docstring(node, clean=False) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def reading_path(root: Path) -> dict | None:
    """Files and lines of the list below the README's heading "Reading path"; None without one.

    ``first_lines`` counts the functions and classes of those files that the list names.
    """
    _, *rest = READING_PATH.split((root / "README.md").read_text(encoding="utf-8"))
    if not rest:
        return None
    counts, first_lines = {}, 0
    for name, seen in LIST_ITEM.findall(NEXT_HEADING.split(rest[0])[0]):
        text, named = (root / name).read_text(encoding="utf-8"), IN_CODE.findall(seen)
        counts[name] = len(text.splitlines())
        for node in ast.parse(text).body:
            if getattr(node, "name", None) in named:
                first_lines += node.end_lineno - node.lineno + 1
    found = {"files": len(counts), "lines": sum(counts.values()), "first_lines": first_lines}
    return found | {"in_order": counts}


if __name__ == "__main__":
    run(main)
