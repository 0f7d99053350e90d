"""Examine skills and draw what each does to all abilities: python scripts/report.py"""

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval_model
from core.errors import UserError, run
from core.files import atomic_write
from core.options import CheckedOptions, option, parse, require
from core.paths import bundled_data, find_skill, skill_name, skill_weights, weights_text
from scripts.exam import SHARED, Asked, Exam, examine, read_columns

SKILLS_HELP = "skills, or mixes such as 'a=0.7 b' (default: all of the base, and their sum)"
QUESTIONS_HELP = "NAME=FILE: a skill's held-out questions (default: the bundled ones)"
DATA_HELP = "NAME=FILE: what a skill was trained on, to tell near from far questions"


@dataclass
class Options(CheckedOptions):
    """Ask a base, its skills and their mixes held-out questions; judge them and write a report.

    A question is a row {"question": TEXT or a list of turns, "expect": [...], "forbid": [...]}: an
    answer is right if it holds an expected text and no forbidden one. FILE alone belongs to the one
    skill that has no bundled file.
    """

    skills: tuple[str, ...] = option((), SKILLS_HELP)
    out_dir: Path = option(Path("out"), "folder of the trained files")
    base: Path | None = option(None, eval_model.BASE_HELP)
    questions: tuple[str, ...] = option((), QUESTIONS_HELP)
    data_path: tuple[str, ...] = option((), DATA_HELP)
    seeds: tuple[int, ...] = option((0,), "each draws all answers anew; the figures are over all")
    most: int = option(40, "most questions of a column, evenly spread over its file", at_least=1)
    max_new_tokens: int = option(48, "longest answer", at_least=1)
    output: Path | None = option(None, "folder of the report (default: report in out_dir)")
    load_in_4bit: bool = option(False, "the base in 4 bits, as its QLoRA skills were trained")
    device: str = option("auto", "auto (cuda, then mps, then cpu), or a device such as cuda:1")
    tokenizer_path: Path | None = option(None, "tokenizer folder (default: the base's own)")
    allow_base_mismatch: bool = option(False, "use a skill on a base it was not trained on")

    def __post_init__(self):
        super().__post_init__()
        self.skills = tuple(weights_text(skill_weights(word.split())) for word in self.skills)
        wrong = "--seeds must be different whole numbers from 0 to 2^63 - 1"
        differ = len(set(self.seeds)) == len(self.seeds) > 0
        require(differ and all(0 <= seed < 2**63 for seed in self.seeds), wrong)


def main(argv: list[str] | None = None) -> Exam:
    """Write report.md, report.json and report.png, print the verdicts and return the exam."""
    options = parse(Options, argv)
    session, facts = opened(options, options.max_new_tokens)
    asked = options.skills or fitting(session)
    alone = dict.fromkeys(name for words in asked for name in skill_weights(words.split()))
    everyone = dict.fromkeys(["", *alone, *asked])
    questions = files_of("questions", options.questions, alone, "probes_{}.jsonl")
    data = files_of("data_path", options.data_path, alone, "lora_{}.jsonl")
    lacking = ", ".join(data.keys() - questions.keys())
    require(not lacking, f"{lacking}: name its questions, too: --questions {lacking}=FILE")
    for who in everyone:  # what cannot be used is refused before anyone is asked
        session.use_skill(who)
    columns = read_columns(alone, questions, data, options.most)
    answerers = {who: partial(ask, session, who) for who in everyone}
    folder = options.output or options.out_dir / "report"
    # Where the folder cannot be written, all answers would be lost: try before.
    atomic_write(folder / "report.part", lambda file: None)
    (folder / "report.part").unlink()
    exam = examine(columns, answerers, options.seeds)
    dim = session.model.config.hidden_size
    facts["skills"] = {name: find_skill(options.out_dir, name, dim).name for name in alone}
    write(exam, facts, folder)
    return exam


def opened(options, max_new_tokens: int, otherwise: str | None = None) -> tuple:
    """A chat with the base as the chat's door has it by default, and what it is, as JSON.

    ``otherwise`` serves a base without a chat template if the first skill names none.
    """
    from dataset.tokenizer import tokenizer_of
    from model.generation import Sampling
    from serving.session import ChatSession
    from trainer.runtime import Runtime

    first = next((name for words in options.skills for name in skill_weights(words.split())), None)
    settings = {"out_dir": options.out_dir, "base": options.base, "lora_name": first}
    chat = eval_model.Options(**settings, load_in_4bit=options.load_in_4bit)
    device = Runtime.start(options.device, "float32").device
    base, model, record, skill = eval_model.opened(chat, device)
    named, template = options.tokenizer_path, skill and skill[1].prompt_template
    tokenizer = tokenizer_of(record, base, named, options.out_dir, None, template or otherwise)
    drawing = {"temperature": chat.temperature, "top_p": chat.top_p}
    drawing["max_new_tokens"] = max_new_tokens
    session = ChatSession(
        model,
        tokenizer,
        Sampling(**drawing),
        seed=0,
        history_cnt=chat.history_cnt,
        continues=(record.stage or base.name.partition("_")[0]) == "pretrain",
        out_dir=options.out_dir,
        allow_base_mismatch=options.allow_base_mismatch,
    )
    print(f"base: {base}")
    of_base = {"file": base.name, "fingerprint": record.fingerprint}
    return session, {"base": of_base, "drawing": drawing}


def fitting(session) -> list[str]:
    """The skills of the session's base and, if there are several that have one, their sum."""
    found = []
    for name, reason in session.skills():
        if reason:
            print(f"left out {name}: {reason}")
        else:
            found.append(name)
    found.sort()
    try:
        session.use_skill(" ".join(found))
    except UserError as error:
        print(f"left out the sum of all: {error}")
        return found
    return [*found, " ".join(found)]


def files_of(
    name: str, words: Iterable[str], skills: Collection[str], bundled: str
) -> dict[str, Path]:
    """Each skill's file: the one that ``words`` give, as option ``name``, or a bundled one."""
    found = {skill: bundled_data(bundled.format(skill)) for skill in skills if skill not in SHARED}
    found = {skill: path for skill, path in found.items() if path.is_file()}
    named = {}
    for word in words:
        skill, equals, file = word.partition("=")
        if not equals:
            lacking = [skill for skill in skills if skill not in found]
            require(len(lacking) == 1, f"--{name} {word}: say whose it is, as in NAME={word}")
            skill, file = lacking[0], word
        skill = skill_name(skill)
        require(skill not in named, f"--{name}: {skill} is named twice; give it one file")
        require(skill in skills, f"--{name} {word}: {skill} is none of {', '.join(skills)}")
        found[skill] = named[skill] = Path(file)
    return found


def ask(session, who: str, asked: Sequence[Asked]) -> list[str]:
    """The answers of the base (""), a skill or a mix to the last turns of fresh chats."""
    session.use_skill(who)
    questions, seeds = zip(*asked, strict=True)
    answers = session.reply_all([question.turns for question in questions], seeds)
    return [answer.strip() for answer in answers]


def write(exam: Exam, facts: dict, folder: Path) -> None:
    """Write the report's three files and print its verdicts."""
    content = json.dumps(facts | exam.to_json(), indent=1, ensure_ascii=False)
    drawing = facts["drawing"] | {"seeds": " ".join(map(str, exam.seeds))}
    drawn = ", ".join(f"{name} {value}" for name, value in drawing.items())
    heading = f"# {facts['base']['file']} and its skills\n\nQuestions answered right, {drawn}:"
    text = f"{heading}\n\n{exam.to_markdown()}"
    atomic_write(folder / "report.json", lambda file: file.write(content.encode()))
    atomic_write(folder / "report.md", lambda file: file.write(text.encode()))
    atomic_write(folder / "report.png", exam.draw)
    print(*exam.verdicts(), f"saved {folder / 'report.md'}, .json and .png", sep="\n")


if __name__ == "__main__":
    run(main)
