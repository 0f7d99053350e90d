"""Show that MiniMind's own code and this one compute the same.

    python benchmarks/parity_minimind.py --minimind DIR

Files go both ways, base and LoRA, and the fp32 logits must agree to 1e-5. Two controls must not
agree: a model with one rotary pair's cosine and sine swapped, and one whose LoRA was left out. Exit
code 1 when any of this fails.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.result_file import measured_on
from core.errors import run
from core.files import atomic_write, sha256_file
from core.options import option, parse, require
from core.paths import REPOSITORY

RESULT = REPOSITORY / "benchmarks" / "results" / "parity_minimind.json"
GOLDEN = REPOSITORY / "tests" / "golden" / "parity_minimind.json"
LIMIT = 1e-5  # of the largest difference between fp32 logits
CONTROL_LIMIT = 1e-2  # a control must differ by more than this
GOLDEN_POSITIONS = (0, 1, 2, 17, 40, 71)
# name -> what differs from LMConfig's defaults, and the LoRA rank
CASES = {
    "default 512/8": ({}, 16),
    "small 64/2": ({"dim": 64, "n_layers": 2, "vocab_size": 320, "hidden_dim": 192}, 4),
    "no defaults": (
        {"dim": 96, "n_layers": 3, "n_heads": 6, "n_kv_heads": 6, "vocab_size": 200}
        | {"norm_eps": 1e-3, "rope_theta": 1e4, "multiple_of": 32},
        8,
    ),
    "golden": (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40}
        | {"multiple_of": 16},
        4,
    ),
}
FILES = ("model/LMConfig.py", "model/model.py", "model/model_lora.py")


@dataclass
class Options:
    """Compare logits with MiniMind's own code of April 2025, in both directions, with and without
    LoRA.
    """

    minimind: Path | None = option(None, "the folder of MiniMind's code of April 2025")
    write_golden: bool = option(False, "also write the small figures that the test suite checks")

    def __post_init__(self):
        needed = "--minimind DIR is needed: the folder of MiniMind's code of April 2025"
        require(self.minimind is not None, needed)
        for name in FILES:
            require((self.minimind / name).is_file(), f"--minimind {self.minimind} holds no {name}")


def main(argv: list[str] | None = None) -> None:
    options = parse(Options, argv)
    sources = {name: sha256_file(options.minimind / name)[:16] for name in FILES}
    origin = {**measured_on(("torch", "transformers")), "minimind_sha256": sources}
    print("\n".join(f"{name}: {value}" for name, value in origin.items()), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder) / str(n) for n, name in enumerate(CASES)}
        for name, (settings, rank) in CASES.items():
            write_ours(folders[name], settings, rank)
        run_minimind(options.minimind, list(folders.values()))
        figures = {name: compare(folders[name], *CASES[name]) for name in CASES}
        golden = golden_figures(folders["golden"])
    ok = report(figures)
    result = {**origin, "limit": LIMIT, "control_limit": CONTROL_LIMIT, "passed": ok}
    write_json(RESULT, result | {"cases": figures})
    if not ok:
        sys.exit("parity with MiniMind FAILED: see the lines marked above")
    if options.write_golden:
        write_json(GOLDEN, {"made_by": origin, **golden}, line_per_key=True)


def write_ours(folder: Path, settings: dict, rank: int) -> None:
    """The files that MiniMind's process needs."""
    from benchmarks.seeded_model import PROMPT, add_seeded_lora, seeded_model
    from model.model_lora import save_lora
    from model.weights import save_base

    model, ids = seeded_model(settings)
    save_base(folder / "ours.pth", model)
    config = json.loads((folder / "ours.json").read_text(encoding="utf-8"))["config"]
    add_seeded_lora(model, rank)
    save_lora(model, folder / "ours_lora.pth")
    job = {"config": config, "rank": rank, "ids": ids.tolist(), "prompt": PROMPT}
    write_json(folder / "job.json", job)


def run_minimind(checkout: Path, folders: list[Path]) -> None:
    # -I: neither PYTHONPATH nor this folder comes before MiniMind's own package.
    child = REPOSITORY / "benchmarks" / "minimind_child.py"
    command = [sys.executable, "-I", "-X", "utf8", child, checkout.resolve(), *folders]
    subprocess.run([str(word) for word in command], cwd=checkout, check=True)


def compare(folder: Path, settings: dict, rank: int) -> dict[str, float]:
    """Largest absolute difference of logits for each check; those of the controls must be large."""
    from benchmarks.seeded_model import (
        add_seeded_lora,
        one_by_one,
        seeded_model,
        swap_rotary_pair,
        whole,
    )
    from model.model_lora import apply_lora, load_lora, remove_lora
    from model.weights import load_base, read_tensors

    reference = read_tensors(folder / "logits.pth")
    figures = {}

    def check(name: str, logits, key: str) -> None:
        figures[name] = (logits - reference[key]).abs().max().item()

    model, ids = seeded_model(settings)
    check("base ours -> theirs", whole(model, ids), "ours")
    check("base, one token at a time", one_by_one(model, ids), "ours_cached")
    swap_rotary_pair(model)
    check("control: rotary pair swapped", whole(model, ids), "ours")
    swap_rotary_pair(model)
    add_seeded_lora(model, rank)
    check("LoRA ours -> theirs", whole(model, ids), "ours_lora")
    check("LoRA, one token at a time", one_by_one(model, ids), "ours_lora_cached")
    remove_lora(model)
    check("control: LoRA left out", whole(model, ids), "ours_lora")

    # A lone .pth tells shapes only; what it cannot tell is written beside it.
    if {"n_heads", "norm_eps", "rope_theta"} & settings.keys():
        record = json.loads((folder / "ours.json").read_text(encoding="utf-8"))
        write_json(folder / "theirs.json", {"config": record["config"]})
    model, _ = load_base(folder / "theirs.pth")
    check("base theirs -> ours", whole(model, ids), "theirs")
    apply_lora(model, rank)
    load_lora(model, folder / "theirs_lora.pth")
    check("LoRA theirs -> ours", whole(model, ids), "theirs_lora")
    return figures


def golden_figures(folder: Path) -> dict:
    """MiniMind's logits at a few positions, and what is needed to compute them again."""
    from model.weights import read_tensors

    reference = read_tensors(folder / "logits.pth")
    settings, rank = CASES["golden"]

    def picked(key: str) -> list:
        rows = reference[key][:, list(GOLDEN_POSITIONS)].tolist()
        return [[[round(value, 7) for value in logits] for logits in row] for row in rows]

    figures = {"config": settings, "rank": rank, "positions": GOLDEN_POSITIONS}
    return figures | {"base": picked("ours"), "lora": picked("ours_lora")}


def report(figures: dict[str, dict[str, float]]) -> bool:
    """Print the table; return whether every check holds."""
    print(f"{'configuration':14} {'check':30} max |difference|")
    passed = True
    for case, checks in figures.items():
        for check, difference in checks.items():
            is_control = check.startswith("control")
            holds = difference > CONTROL_LIMIT if is_control else difference <= LIMIT
            verdict = ("differs" if is_control else "equal") if holds else "FAILED"
            print(f"{case:14} {check:30} {difference:.2e}  {verdict}")
            passed &= holds
    return passed


def write_json(path: Path, content: dict, line_per_key: bool = False) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=1)
    if line_per_key:  # long rows of numbers
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        text = "{\n" + ",\n".join(lines) + "\n}"
    atomic_write(path, lambda file: file.write(f"{text}\n".encode()))


if __name__ == "__main__":
    run(main)
