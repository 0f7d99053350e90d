"""Score a base and its skills on data files: python scripts/eval_benchmark.py questions.jsonl

    texts      {"text": "..."}: perplexity of a word and of a byte, bits of a byte
    chats      as in training: loss and perplexity of a learned token, bits of a byte of the answers
    questions  with choices, as CMMLU, C-Eval, MMLU or ARC write them: acc, acc_norm, acc_bytes

The scores of texts and questions are lm-evaluation-harness's, zero-shot and without chat template.
Its tasks MMLU, CMMLU and C-Eval put a sentence on the subject before every question: --description.
Which of the three a file holds follows from its first row.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval_model
from core.errors import UserError, run
from core.files import atomic_write, sha256_file, unfinished
from core.options import CheckedOptions, option, parse, require
from core.paths import cache_dir, skill_weights, weights_text

SKILLS_HELP = "skills, or mixes such as 'a=0.7 b', to score beside the base"
SCORED_HELP = "an answer is its letter, as in CMMLU and MMLU, or its own text, as in ARC"
LENGTH_HELP = "most tokens that the model reads at once; 0: its whole context"
TEMPLATE_HELP = r"writes chats for a base without chat template: 'Q: {user}\nA: '"
DESCRIPTION_HELP = r"text before every question, such as MMLU's 'The following are ...\n\n'"
Score = Callable[..., dict[str, float]]
UNBOUNDED = 2048  # of models whose config names no context, as in lm-evaluation-harness


@dataclass
class Options(CheckedOptions):
    """Print a table of the scores of a base, of its skills and of their mixes.

    A file holds texts, chats, or questions with choices as CMMLU, C-Eval, MMLU or ARC write them.
    """

    files: tuple[Path, ...] = option((), "data files or folders of them", positional=True)
    skills: tuple[str, ...] = option((), SKILLS_HELP)
    out_dir: Path = option(Path("out"), "folder of the trained files")
    base: Path | None = option(None, eval_model.BASE_HELP)
    scored: Literal["letters", "texts"] = option("letters", SCORED_HELP)
    language: Literal["auto", "en", "zh"] = option("auto", "of the words that ask for an answer")
    description: str = option("", DESCRIPTION_HELP)
    most: int = option(0, "most rows of a file, evenly spread over it; 0: all", at_least=0)
    max_seq_len: int = option(0, LENGTH_HELP, at_least=0)
    batch_size: int = option(16, "most rows computed together", at_least=1)
    output: Path | None = option(None, "new JSON file that gets the scores, too")
    prompt_template: str | None = option(None, TEMPLATE_HELP)
    load_in_4bit: bool = option(False, "the base in 4 bits, as its QLoRA skills were trained")
    device: str = option("auto", "auto (cuda, then mps, then cpu), or a device such as cuda:1")
    tokenizer_path: Path | None = option(None, "tokenizer folder (default: the base's own)")
    allow_base_mismatch: bool = option(False, "use a skill on a base it was not trained on")

    def __post_init__(self):
        super().__post_init__()
        self.skills = tuple(weights_text(skill_weights(word.split())) for word in self.skills)
        is_text = self.description == self.description.encode(errors="replace").decode()
        require(is_text, "--description holds bytes that are no text in the terminal's encoding")
        self.description = self.description.replace("\\n", "\n")
        require(self.max_seq_len != 1, "--max_seq_len 1 is too short; give at least 2")
        is_json = self.output is None or self.output.suffix == ".json"
        require(is_json, f"--output {self.output} must end in .json")
        there = self.output is not None and os.path.lexists(self.output)  # even a link to nothing
        require(not there, f"--output: {self.output} exists; choose another or delete it")


def main(argv: list[str] | None = None) -> dict:
    """Print the table, and return what the JSON file holds."""
    options = parse(Options, argv)
    from dataset.files import data_files
    from scripts.report import opened
    from trainer.metrics import strict
    from trainer.runtime import Runtime

    if options.output:  # where it cannot be written, all scores would be lost: try before
        with unfinished(options.output):
            pass
    readers = {path: reader_of(path) for path in data_files(options.files)}
    asks = not options.description or read_questions in readers.values()
    require(asks, "--description is for questions with choices, which none of the files holds")
    # Where no file holds chats, the base needs no template.
    otherwise = options.prompt_template or (None if read_chats in readers.values() else "{user}")
    session, facts = opened(options, 1, otherwise)
    runtime, length = Runtime.start(options.device, "float32"), window(session.model, options)
    everyone, data = dict.fromkeys(["", *options.skills]), []
    # What cannot be used, skills or rows, is refused before anything is scored.
    for who in everyone:
        session.use_skill(who)
    contents = {path: read(path, session, length, options) for path, read in readers.items()}
    for path, (rows, score) in contents.items():
        entry = {"file": path.name, "sha256": sha256_file(path, cache_dir(options.out_dir))}
        data.append(entry | rows | {"scores": {}})
        for who in everyone:
            print(f"scoring {path.name}: {who or 'base'}", file=sys.stderr)
            session.use_skill(who)
            data[-1]["scores"][who or "base"] = score(runtime)
    print(f"\n{table(data)}")
    found = {"base": facts["base"], "max_seq_len": length}
    found["data"] = [entry | {"scores": strict(entry["scores"])} for entry in data]
    if options.output:
        content = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        atomic_write(options.output, lambda file: file.write(content.encode()))
        print(f"\nsaved {options.output}")
    return found


def reader_of(path: Path):
    """Which of the three functions below reads a file. Raises ``UserError`` if none can."""
    from dataset.cache import TEXT, kind_of
    from dataset.choices import has_choices
    from dataset.files import usable_rows
    from dataset.rows import clean_any

    if has_choices(path):
        return read_questions
    if kind := kind_of(path):
        return read_texts if kind is TEXT else read_chats
    usable_rows([path], clean_any, "refuse")  # it says why
    raise UserError(f"{path} holds no rows")


def window(model, options: Options) -> int:
    """How many tokens the model reads at once. Raises ``UserError`` for more than its context."""
    from model.LMConfig import check_length, context_of

    check_length(model.config, options.max_seq_len)
    context = context_of(model.config)
    return options.max_seq_len or (UNBOUNDED if context == sys.maxsize else context)


# Each of these three reads a whole file. It returns what the file holds, and a function of the
# runtime that computes the scores of the session's model as it then is, with its skills.
def read_texts(path: Path, session, length: int, options: Options) -> tuple[dict, Score]:
    """Texts in windows of ``length`` tokens."""
    from dataset.files import usable_rows
    from dataset.questions import spread
    from dataset.requests import prefix_of, rolling_requests, text_ids
    from dataset.rows import clean_text
    from trainer.likelihood import loglikelihoods, text_scores

    rows = usable_rows([path], clean_text, "refuse")
    texts = [row["text"] for row in spread(rows, options.most or len(rows))]
    prefix, ids = prefix_of(session.tokenizer), text_ids(session.tokenizer, texts)
    requests = [each for text in ids for each in rolling_requests(text, prefix, length)]

    def score(runtime) -> dict:
        found = loglikelihoods(session.model, requests, runtime, options.batch_size)
        return text_scores(texts, found.tolist())

    return {"kind": "texts", "rows": len(texts)}, score


def read_chats(path: Path, session, length: int, options: Options) -> tuple[dict, Score]:
    """Chats, cut after ``length`` tokens, of which the answers are scored."""
    import numpy as np

    from dataset.batches import SFTDataset, micro_batches
    from dataset.questions import spread
    from dataset.tokenizer import control_ids
    from trainer.metrics import evaluate

    settings = {"cache": cache_dir(options.out_dir), "val_ratio": 0, "bad_rows": "refuse"}
    chats = SFTDataset((path,), session.tokenizer, length, **settings).train
    total = len(chats.lengths)
    chosen = np.array(spread(range(total), options.most or total))
    parts = micro_batches(chats.lengths, chosen, options.batch_size)

    def score(runtime) -> dict:
        batches, control = map(chats.collate, parts), control_ids(session.tokenizer)
        found = evaluate(session.model, batches, runtime, control)
        scores = {"loss": found.loss, "perplexity": math.exp(found.loss)}
        return scores | {"bits_per_byte": found.bits_per_byte}

    return {"kind": "chats", "rows": len(chosen)}, score


def read_questions(path: Path, session, length: int, options: Options) -> tuple[dict, Score]:
    """Questions with choices; the scores are the shares that are answered right."""
    from dataset.choices import asked, clean_choices, language_of
    from dataset.files import place_of, read_rows, usable_rows
    from dataset.questions import spread
    from dataset.requests import pair_requests
    from trainer.likelihood import choice_scores, loglikelihoods

    rows = usable_rows([path], clean_choices, "refuse")
    language = language_of(rows) if options.language == "auto" else options.language
    placed = list(read_rows(path, clean_choices))
    questions, answers, requests = [], [], []
    for place, each in spread(placed, options.most or len(placed)):
        context, texts = asked(each, options.scored, language)
        try:
            whole = options.description + context
            requests.append(pair_requests(session.tokenizer, whole, texts, length))
        except UserError as error:
            raise UserError(f"{place_of(path, place)}: {error}") from error
        questions.append(each)
        answers.append(texts)
    flat = [request for each in requests for request in each]

    def score(runtime) -> dict:
        found = iter(loglikelihoods(session.model, flat, runtime, options.batch_size).tolist())
        likelihoods = [[next(found) for _ in texts] for texts in answers]
        return choice_scores(questions, answers, likelihoods)

    facts = {"kind": "questions", "rows": len(questions), "language": language}
    facts["chance"] = sum(1 / len(texts) for texts in answers) / len(answers)
    return facts | {"scored": options.scored, "description": options.description}, score


def table(data: Sequence[dict]) -> str:
    """The scores in Markdown: a row for each, a column for everyone."""
    everyone = list(data[0]["scores"])
    lines = [["data", "score", *everyone], ["---", "---", *["---:"] * len(everyone)]]
    for entry in data:
        label = f"{entry['file']}: {entry['rows']} {entry['kind']}"
        if "chance" in entry:
            label += f" ({entry['language']}), chance {100 * entry['chance']:.3g} %"
        for name in entry["scores"]["base"]:
            if not name.endswith("_stderr"):
                cells = [cell(entry["scores"][who], name) for who in everyone]
                lines.append([label, name, *cells])
                label = ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(scores: dict, name: str) -> str:
    """A share as ``27.5 ± 2.2 %``, any other score as a number."""
    error = scores.get(f"{name}_stderr")
    if error is None:
        return f"{scores[name]:.5g}"
    around = "" if math.isnan(error) else f" ± {100 * error:.1f}"
    return f"{100 * scores[name]:.1f}{around} %"


if __name__ == "__main__":
    run(main)
