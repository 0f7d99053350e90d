"""A skill takes nothing away: general chats that hold it to its base, and what it costs."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.files import atomic_write, sha256_file
from core.paths import bundled_data, cache_dir, is_pretrained
from dataset.batches import KEEP, Batch, ChatSamples, PretrainDataset, SFTDataset
from dataset.cache import CHAT, Kind, digest
from dataset.chat import encode_chat, ends_of_answer
from dataset.files import data_files
from dataset.questions import Neighbours, chat_of, chats_in, questions_in, rows_in, spread
from dataset.tokenizer import control_spelling, tokenizer_fingerprint
from model.generation import Sampling, generate_all
from model.LMConfig import context_of
from model.lora.layer import without_lora
from model.loss import keep_sum
from trainer.loop import LossSum, causal_loss_sum
from trainer.metrics import Metrics, Validation, evaluate, evaluate_kept
from trainer.options import TrainOptions
from trainer.runtime import Runtime
from trainer.stage import Base, read_data, validation_of

ALIKE = 0.35  # a general chat whose question is so near to one of the skill's asks what it teaches
BUNDLED = (bundled_data("sft_mini"),)
STRANGE = bundled_data("strange_mini.jsonl")  # where a skill would speak unasked
ASKED = 96  # questions of a path that a base answers: a model of 135 M takes minutes on a laptop
JUDGING_SHARE = 0.2  # of general rows, where the base learned none of them
LONGEST_ANSWER = 48  # tokens
SHOWN, COMPARED = 3, 20  # held-out questions whose answers are shown; general ones, compared
FEW_ROWS = 20  # so few chats are learned by heart
MOST_JUDGES = 128  # general chats of a validation, which a run makes about ten times
FEW_JUDGES = 30  # held-out chats on which the choice of the best weights is shaky
SMALL_RISE = 0.05  # of the general loss, nats per token: below it nobody would notice
LABELS = {"pairs": "pairs loss, nats/pair"}
FEW_CHANGED = 0.25  # of the general answers: that of a tiny base may have been a toss-up


@dataclass
class General:
    """Chats that have nothing to do with the skill; either may be missing.

    ``holding`` rows hold the skill to its base in training. ``judging`` rows tell what it costs:
    they are none of those, and none that the base has learned.
    """

    holding: ChatSamples | None = None
    judging: ChatSamples | None = None


@dataclass(frozen=True)
class Taught:
    """The rows that a run is for: their name, their summed loss, and what measures held-out ones.

    ``measure`` is called as ``evaluate`` is.
    """

    name: str = "domain"
    loss_sum: LossSum = causal_loss_sum
    measure: Callable[..., Metrics] = evaluate


def plugged(
    options: TrainOptions,
    base: Base,
    data: PretrainDataset,
    runtime: Runtime,
    model: nn.Module | None = None,
    taught: Taught = Taught(),
) -> dict:
    """What makes a run of ``run_stage`` keep what ``base`` could do before.

    The model of ``base`` carries a LoRA and is trained itself, or is a frozen copy of ``model``.
    Raises ``UserError`` as ``read_general`` does.
    """
    model, own = model or base.model, chats_in(options.data_path, clean=data.kind.clean)
    general = read_general(options, base, runtime, own)
    held_out = {taught.name: data.val} | ({"general": general.judging} if general.judging else {})
    measures = {taught.name: taught.measure, "general": partial(evaluate_kept, base=base.model)}
    validation = validation_of(model, held_out, base.tokenizer, options, runtime, measures)
    if not options.dry_run:
        runtime.on_first(lambda: validation(step=0))
    return {
        "validation": validation,
        "verdict": partial(verdict, model, base, options, data, general, validation),
        "loss_sum": partial(skill_loss_sum, base=base.model, own=taught.loss_sum),
        "holding": general.holding,
    }


def read_general(
    options: TrainOptions, base: Base, runtime: Runtime, own: Iterable[list[dict]]
) -> General:
    """The chats of ``options.general_data``, without those that ask what the ``own`` chats do.

    Without such files, those are the bundled chats, or what a base of other makers answers to
    their questions itself. Bundled texts that nobody would answer hold too, and what the base
    answers to ``keep_questions``, both half as often: ``options`` get all these files. With
    ``keep`` 0 nothing is held, and chats that the base's template cannot show stop no run. Else
    raises ``UserError`` where none is left.
    """
    judges, holds = general_files(options, base, runtime)
    options.general_data = (*judges, *holds)
    general = replace(options, data_path=options.general_data, bad_rows="skip")
    general.val_ratio = 0.0  # shared out below
    try:
        chats = read_data(SFTDataset, general, base.tokenizer, runtime).train
        settled = control_spelling(base.tokenizer), options.control_text
        asked = Neighbours(question for chat in own for question in questions_in(chat))
        alike = digests(
            chat
            for chat in chats_in(options.general_data, *settled)
            if any(asked.similarity(question) > ALIKE for question in questions_in(chat))
        )
        strange, answers = (digests(chats_in(paths, *settled)) for paths in (holds[:1], holds[1:]))
        share, is_learned = judging_share(base, data_files(judges), options)
        if not len(chats.without(strange + answers).lengths):
            raise UserError(f"no answer lies within max_seq_len {options.max_seq_len}")
        if not len((real := chats.without(strange + answers + alike)).lengths):
            raise UserError("every chat asks what this run teaches")
        real, judging = real.split(share)
    except UserError as error:
        if options.keep:
            way_out = "name other chats, or train without them by keep=0"
            raise UserError(f"general_data: {error}; {way_out}") from error
        print(f"note: what training costs in general is not measured: {error}")
        return General()
    if is_learned:
        print(f"note: {base.path} was trained without held-out rows: no general chat can judge")
        judging = None
    else:
        judging = judging.only(spread(sorted(judging.digests()), MOST_JUDGES))
    others = [chats.only(set(each).difference(alike)) for each in (strange, answers)]
    holding = real.with_half(others)
    counts = [
        len(set(each.digests())) if each else 0 for each in (options.keep and holding, judging)
    ]
    said = f"{counts[0]} of them hold, {counts[1]} judge"
    print(f"  {said}; {len(set(alike))} are left out, which ask what this run teaches")
    return General(holding if options.keep else None, judging)


def general_files(
    options: TrainOptions, base: Base, runtime: Runtime
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files of chats that judge and hold, and of those that hold only."""
    judges = options.general_data or BUNDLED
    if not options.general_data and is_pretrained(base.path):
        judges = (own_answers(base, BUNDLED, options, runtime),)
    holds = (STRANGE,) if options.keep else ()
    for path in dict.fromkeys(options.keep_questions):
        holds += (own_answers(base, (path,), options, runtime),)
    return judges, holds


def digests(chats: Iterable[list[dict]]) -> list[int]:
    """What the token table calls these chats."""
    return [digest({"conversations": chat}) for chat in chats]


def judging_share(base: Base, files: list[Path], options: TrainOptions) -> tuple[float, bool]:
    """The share of these general rows that judges, and whether the base has learned those too.

    It is the share that the base's own run held out, if it learned from one of the files.
    """
    cache = cache_dir(options.out_dir)
    # Of what its run read, general chats are not learned: they only held it.
    learned = {e.get("sha256") for e in base.record.data if e.get("option") != "general_data"}
    if not learned & {sha256_file(file, cache) for file in files}:
        return JUDGING_SHARE, False
    return base.held_out_share, base.record.val_ratio == 0


def own_answers(
    base: Base, paths: tuple[Path, ...], options: TrainOptions, runtime: Runtime
) -> Path:
    """A file of the questions in ``paths`` with the base's own likeliest answers, made once.

    What holds a skill must not be the knowledge of others: neither the bundled answers of a toy,
    on a model of other makers, nor those of another skill.
    """
    asked = [dict.fromkeys(questions_in(chat)[0] for chat in chats_in([path])) for path in paths]
    questions = list(dict.fromkeys(q for each in asked for q in spread(list(each), ASKED)))
    if not questions:
        raise UserError(f"{', '.join(map(str, paths))} holds no question to ask")
    known = [base.record.fingerprint, tokenizer_fingerprint(base.tokenizer), LONGEST_ANSWER]
    known += [options.load_in_4bit, questions]
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    path = cache_dir(options.out_dir) / f"answers-{key}.jsonl"
    with runtime.first_alone():
        if not path.is_file():
            print(f"asking {base.path} {len(questions)} general questions, once", flush=True)
            rows = answered(base, questions)
            lines = "".join(json.dumps({"conversations": row}) + "\n" for row in rows)
            atomic_write(path, lambda file: file.write(lines.encode()))
    return path


def answered(base: Base, questions: Iterable[str]) -> list[list[dict]]:
    """Chats of these questions and the base's own answers; without those that have none."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    with without_lora(base.model):
        found = zip(chats, likeliest(base.model, base.tokenizer, chats), strict=True)
    return [[*chat, {"role": "assistant", "content": text}] for chat, text in found if text]


def likeliest(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, chats: Iterable[list[dict]]
) -> list[str | None]:
    """The greedy answer to the question that ends each chat, of at most ``LONGEST_ANSWER`` ids.

    None for a question that leaves no room in the context.
    """
    prompts = [encode_chat(tokenizer, chat, add_generation_prompt=True)[0] for chat in chats]
    fits = [len(ids) < context_of(model.config) for ids in prompts]
    short = list(compress(prompts, fits))
    sampling = Sampling(temperature=0.0, max_new_tokens=LONGEST_ANSWER)
    rngs = [torch.Generator()] * len(short)
    found = iter(generate_all(model, short, sampling, ends_of_answer(tokenizer), rngs))
    texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found)
    return [next(texts) if fit else None for fit in fits]


def skill_loss_sum(
    model: nn.Module, batch: Batch, *, base: nn.Module, own: LossSum = causal_loss_sum
) -> Tensor:
    """The loss of a run's ``own`` rows; on general ones, how far ``model`` is from its base."""
    if batch.kind == KEEP:
        return keep_sum(model, base, batch.inputs, batch.labels)
    return own(model, batch)


@torch.compiler.set_stance("force_eager")
def verdict(
    model: nn.Module,
    base: Base,
    options: TrainOptions,
    data: PretrainDataset,
    general: General,
    validation: Validation,
) -> dict:
    """Print what ``model`` has learned and what it costs; returns it for its record."""
    was_training = model.training
    model.eval()
    own = chats_of(data.val, options.data_path, options, base.tokenizer, data.kind)
    others = chats_of(general.judging, options.general_data, options, base.tokenizer)
    shown = answers(model, base, spread(own, SHOWN))
    pairs = answers(model, base, spread(others, COMPARED))
    model.train(was_training)
    changed = sum(pair["before"] != pair["after"] for pair in pairs)
    losses = {}
    print(f"\n{'what was learned':24}{'before':>10}{'after':>10}")
    for kind, result in validation.results.items():
        if result:
            losses[kind] = result["first"], result.get("best", result["last"])
            before, after = (each["loss"] for each in losses[kind])
            print(f"{LABELS.get(kind, kind + ' loss, nats/token'):24}{before:10.4f}{after:10.4f}")
    if options.skill:
        print("before: losses of the skill that this run went on with, answers of its base")
    if pairs:
        print(f"general answers changed: {changed} of {len(pairs)}")
    for each in shown:
        print(f"> {each['question']}")
        for name in ("row", "before", "after"):
            print(f"  {name + ':':8}{each[name]}")
    sentence = summary_of(losses, changed, len(pairs))
    judges = len(data.val.lengths)
    if options.keep_best and 0 < judges < FEW_JUDGES:
        print(f"note: of the run's own rows, only {judges} chose the best weights")
    for text in (sentence, *(warnings_on(data.train) if data.kind is CHAT else ())):
        print(text)
    told = {"sentence": sentence, "general_answers": len(pairs), "changed": changed}
    return {"verdict": told | {"answers": shown}}


def summary_of(losses: dict[str, tuple[dict, dict]], changed: int, asked: int) -> str:
    """One plain sentence on the results before and after training."""
    if not (own := losses.keys() - {"general"}):
        return "nothing was held out, so nobody can tell what was learned: raise val_ratio"
    before, after = (result["loss"] for result in losses[own.pop()])
    if after > 0.98 * before:
        way_out = "raise learning_rate or epochs, or give more rows"
        return (
            f"learned nothing: the held-out loss went from {before:.3f} to {after:.3f}; {way_out}"
        )
    if "general" not in losses:
        return "learned; what it costs in general was not measured"
    first, last = (result["loss"] for result in losses["general"])
    costs = [f"the general loss rose by {last - first:.3f}"] if last - first > SMALL_RISE else []
    if changed > FEW_CHANGED * asked:
        costs.append(f"{changed} of {asked} general answers changed")
    if costs:
        return f"learned, but {' and '.join(costs)}: raise keep or keep_rows, or train for less"
    return "learned; costs nothing measurable"


def warnings_on(own: ChatSamples) -> list[str]:
    """What makes rows poor teachers: too few of them, and one question with several answers."""
    found, answered = [], defaultdict(set)
    for n in range(len(own.lengths)):
        row = own[n]
        learned = bytes((row % 2).tolist())
        first = learned.index(1)
        end = first + len(learned[first:]) - len(learned[first:].lstrip(b"\1"))
        answered[row[:first].tobytes()].add(row[first:end].tobytes())
    if len(own.lengths) < FEW_ROWS:
        few = f"{len(own.lengths)} rows to learn from"
        found.append(f"warning: {few} are few: it may know them by heart only")
    if several := sum(len(different) > 1 for different in answered.values()):
        found.append(f"warning: {several} questions have more than one answer in the rows")
    return found


def chats_of(
    samples: ChatSamples | None,
    paths: tuple[Path, ...],
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind = CHAT,
) -> list[list[dict]]:
    """The chats of these files, or chosen chats of their pairs, that are among ``samples``."""
    if samples is None or not len(samples.lengths):
        return []
    wanted = set(samples.digests())
    rows = rows_in(paths, control_spelling(tokenizer), options.control_text, kind.clean)
    return [chat_of(row) for row in rows if digest(row) in wanted]


def answers(model: nn.Module, base: Base, chats: Iterable[list[dict]]) -> list[dict]:
    """The last question of each chat, what its row answers, and what ``base`` and ``model`` do.

    These are "row", "before" and "after". Questions that leave no room in the context are left out.
    """
    asked, given = [], []
    for chat in chats:
        last = max(n for n, message in enumerate(chat) if message["role"] == "user")
        asked.append(chat[: last + 1])
        given.append(chat[last + 1]["content"])
    with without_lora(base.model):
        before = likeliest(base.model, base.tokenizer, asked)
    found = zip(asked, given, before, likeliest(model, base.tokenizer, asked), strict=True)
    names = "question", "row", "before", "after"
    return [
        dict(zip(names, (chat[-1]["content"], *texts), strict=True))
        for chat, *texts in found
        if None not in texts
    ]
