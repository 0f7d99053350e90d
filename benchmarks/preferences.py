"""What a preference costs: python benchmarks/preferences.py --bases FILE FILE FILE

Trains the bundled pairs on each base in each of ``ARMS``, and asks questions that no chat and no
pair asks: how many answers have the preferred style, and how many are right, before and after?
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.domain import seconds_a_step
from benchmarks.result_file import measured_on, read_results, write_results
from core.errors import run
from core.options import CheckedOptions, option, parse, require
from core.paths import bundled_data
from dataset.questions import spread
from scripts.exam import holds_any, read_questions
from scripts.quickstart_stages import flag_words

SKILL = {"lora_name": "polite"}
# Options of each arm.
ARMS = {
    "default": {},
    "keep 0": {"keep": 0},
    "keep 0.02": {"keep": 0.02},
    "keep 0.2": {"keep": 0.2},
    "keep 3": {"keep": 3},
    "rate 3e-5": {"learning_rate": 3e-5},
    "rate 3e-4": {"learning_rate": 3e-4},
    "skill": SKILL,
    "skill, keep 0": SKILL | {"keep": 0},
}
SYSTEM = {True: "Please be very polite to me.", False: "请对我客气一点。"}
STYLE = ("My friend", "亲爱的朋友")  # as dataset/texts/system.json asks for it
ASKED = 30
SHARED = {"max_seq_len": 256, "log_interval": 1000, "save_interval": 10**6}


@dataclass
class Options(CheckedOptions):
    """Train, ask and compare; one arm after another, but for those in the result file."""

    bases: tuple[Path, ...] = option((), "chat bases, one for each seed from 1 on")
    arms: tuple[str, ...] = option(tuple(ARMS), "which of ARMS")
    result: Path | None = option(Path("benchmarks/results/preferences.json"), "file of the figures")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.bases), "--bases names no file: give chat bases")
        unknown = set(self.arms) - ARMS.keys()
        require(not unknown, f"there is no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    from model.weights import load_base, read_record

    before = read_results(options.result)
    settings = {"asked": ASKED, "bases": [read_record(file).fingerprint for file in options.bases]}
    found = before.get("found", {}) if settings.items() <= before.items() else {}
    told = [counts_of(load_base(file)[0], file, SYSTEM) for file in options.bases]
    settings |= {"told by a system turn": told, **measured_on(("torch",))}
    print(f"told by a system turn: {told}")
    with tempfile.TemporaryDirectory() as folder:  # one for all, for its cache of tokens
        for arm in (arm for arm in options.arms if arm not in found):
            seeded = enumerate(options.bases, 1)
            runs = [figures_of(arm, base, seed, Path(folder)) for seed, base in seeded]
            found[arm] = {name: mean(each[name] for each in runs) for name in runs[0]}
            found[arm]["runs"] = runs
            shown = {name: round(x, 3) for name, x in found[arm].items() if name != "runs"}
            print(f"== {arm}: {json.dumps(shown)}", flush=True)
            write_results(options.result, settings | {"arms": ARMS, "found": found})
    write_results(options.result, settings | {"arms": ARMS, "found": found})
    return found


def figures_of(arm: str, file: Path, seed: int, out: Path) -> dict[str, float]:
    """Train an arm on a base; what the run measured, and the answers before and after."""
    import train_dpo
    from model.lora.skill_file import read_lora
    from model.model_lora import attach_lora
    from model.weights import load_base, read_record

    base, _ = load_base(file)
    figures = {f"{name}, before": count for name, count in counts_of(base, file).items()}
    flags = SHARED | {"base": file, "out_dir": out, "seed": seed} | ARMS[arm]
    path = train_dpo.main(flag_words(flags))
    if "lora_name" in ARMS[arm]:
        attach_lora(base, path)
        metrics = read_lora(path)[1].metrics
    else:
        base, _ = load_base(path)
        metrics = read_record(path).metrics
    figures |= counts_of(base, file)
    figures["seconds a step"] = seconds_a_step(out, path.name.removesuffix(".pth"))
    figures |= {f"pairs: {name}": x for name, x in metrics["pairs"]["last"].items()}
    general = metrics["general"]
    figures["general loss, rise"] = general["last"]["loss"] - general["first"]["loss"]
    return figures | {"general answers changed": metrics["verdict"]["changed"]}


def counts_of(model, file: Path, system: dict[bool, str] | None = None) -> dict[str, int]:
    """Of ``ASKED`` general questions, how many are answered in the style, and how many right.

    ``system``: the system turns before English questions (True) and Chinese ones.
    """
    from dataset.tokenizer import tokenizer_of
    from model.weights import read_record
    from trainer.keeping import likeliest

    tokenizer = tokenizer_of(read_record(file), file, None, file.parent)
    asked = spread(read_questions(bundled_data("probes_general.jsonl")), ASKED)
    chats = [[{"role": "user", "content": question.turns[-1]}] for question in asked]
    if system:
        first = [system[chat[0]["content"].isascii()] for chat in chats]
        chats = [[{"role": "system", "content": t}, *c] for t, c in zip(first, chats, strict=True)]
    answers = likeliest(model.eval(), tokenizer, chats)
    right = sum(q.is_hit(answer) for q, answer in zip(asked, answers, strict=True))
    return {"style": sum(holds_any(answer, STYLE) for answer in answers), "right": right}


if __name__ == "__main__":
    run(main)
