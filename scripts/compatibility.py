"""Which other tools take a skill, and how to write it for them: python scripts/compatibility.py"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.files import atomic_write
from core.options import CheckedOptions, option, parse, require
from core.paths import find_skill, is_pretrained
from eval_model import BASE_HELP


@dataclass
class Options(CheckedOptions):
    """Print a table of tools: does each take the skill as an adapter, or merged into its base?"""

    lora_name: str | None = option(None, "the skill")
    out_dir: Path = option(Path("out"), "folder of the trained files")
    base: Path | None = option(None, BASE_HELP)
    output: Path | None = option(None, "also write the table as this JSON file")

    def __post_init__(self):
        super().__post_init__()
        require(self.lora_name is not None, "name the skill with --lora_name NAME")
        there = self.output is not None and self.output.exists()
        require(not there, f"--output: {self.output} exists; choose another or delete it")


def main(argv: list[str] | None = None) -> list[dict[str, str]]:
    """Print the table and return its rows."""
    options = parse(Options, argv)
    from interop.compatibility import verdicts
    from model.lora.layer import features
    from model.lora.skill_file import adapters_in, read_lora
    from model.lora.targets import linears
    from model.weights import choose_base, load_base

    path = find_skill(options.out_dir, options.lora_name)
    skill = read_lora(path)
    base = choose_base(options.out_dir, options.base, skill[1].base)
    model, _ = load_base(base)
    adapters_in(model, path, skill, with_extra=True)  # refused unless it is this base's
    sizes = {name: features(linear) for name, linear in linears(model).items()}
    square = {name for name, (outputs, inputs) in sizes.items() if outputs == inputs}
    is_ours = not is_pretrained(base)
    found = verdicts(skill, is_ours, square)
    rows = [vars(each) | {"command": command(options.lora_name, each, is_ours)} for each in found]
    print(f"{path}, for {base}\n\n{as_table(rows)}")
    if options.output is not None:
        told = {"skill": path.name, "base": skill[1].base, "verdicts": rows}
        text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
        atomic_write(options.output, lambda file: file.write(text.encode()))
    return rows


def command(name: str, verdict, is_ours: bool) -> str:
    """What writes the skill for a tool; empty where nothing does."""
    from interop.compatibility import ADAPTER

    if not verdict.written:
        return ""
    if not is_ours and verdict.form != ADAPTER:
        return f"scripts/merge_lora.py --lora_name {name}"
    flag = "lora_name" if verdict.form == ADAPTER else "skill"
    return f"scripts/convert_model.py --to {verdict.written} --{flag} {name} --output PATH"


def as_table(rows: list[dict[str, str]]) -> str:
    """Markdown, a row for each verdict."""
    names = ("tool", "form", "verdict", "why", "command")
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run(main)
