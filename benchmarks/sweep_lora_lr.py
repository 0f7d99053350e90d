"""Which peak learning rate and how many epochs a skill needs: the measurement behind
train_lora.py's defaults.

python benchmarks/sweep_lora_lr.py --out_dir out/quickstart   (after the quick start, on its base
and bundled skills)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse
from core.paths import bundled_data

RATES = (5e-5, 1e-3, 3e-3, 1e-2)  # the first is MiniMind's own
SKILLS = ("identity", "medical")


@dataclass
class Options:
    """Train both bundled skills at each learning rate; report held-out loss, general loss and
    held-out answers.
    """

    out_dir: Path = option(
        Path("out/quickstart"), "folder with a full_sft_* base; the skills go to sweep/ in it"
    )
    epochs: int = option(20, "passes over each skill's data")
    max_seq_len: int = option(256, "tokens of a row")
    result: Path | None = option(None, "also write the figures to this JSON file")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    import train_lora
    from benchmarks.result_file import measured_on, write_results
    from model.lora.skill_file import read_lora
    from model.weights import choose_base
    from scripts.quickstart_answers import ask_all

    base = choose_base(options.out_dir, stages=("full_sft",))
    rows = []
    for skill in SKILLS:
        for rate in RATES:
            argv = [
                "--out_dir",
                str(options.out_dir / "sweep"),
                "--base",
                str(base),
                "--lora_name",
                skill,
            ]
            argv += [
                "--data_path",
                str(bundled_data(f"lora_{skill}.jsonl")),
                "--learning_rate",
                str(rate),
            ]
            path = train_lora.main(
                [*argv, "--epochs", str(options.epochs), "--max_seq_len", str(options.max_seq_len)]
            )
            metrics = read_lora(path)[1].metrics
            probes = ask_all(base, (skill,), options.out_dir / "sweep")
            row = {"skill": skill, "learning_rate": rate}
            for data in ("domain", "general"):
                row |= {
                    f"{data}_{when}": round(metrics[data][when]["loss"], 3)
                    for when in ("first", "last")
                }
            row["held_out_answers"] = (
                f"{sum(probe.is_hit(skill) for probe in probes)}/{len(probes)}"
            )
            rows.append(row)
    print("\n" + " | ".join(rows[0]))
    for row in rows:
        print(" | ".join(map(str, row.values())))
    figures = {
        "base": base.name,
        "epochs": options.epochs,
        "rows": rows,
        **measured_on(("torch", "transformers")),
    }
    write_results(options.result, figures)
    return figures


if __name__ == "__main__":
    run(main)
