"""A skill takes nothing away: general chats that hold it to its base, and what it costs."""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.files import atomic_write, sha256_file
from core.paths import bundled_data, cache_dir, is_pretrained
from dataset.batches import KEEP, Batch, ChatSamples, SFTDataset
from dataset.cache import digest
from dataset.chat import encode_chat, ends_of_answer
from dataset.files import data_files
from dataset.similarity import Neighbours, chats_in, questions_in
from model.generation import Sampling, generate
from model.lora.layer import without_lora
from model.loss import keep_sum
from trainer.loop import causal_loss_sum
from trainer.metrics import Validation
from trainer.options import TrainOptions
from trainer.runtime import Runtime
from trainer.stage import Base, read_data, validation_of

ALIKE = 0.35  # a general chat whose question is so near to one of the skill's asks what it teaches
BUNDLED = bundled_data("sft_mini.jsonl")
ASKED = 160  # bundled questions that a base of other makers answers itself
JUDGING_SHARE = 0.2  # of general rows, where the base learned none of them
LONGEST_ANSWER = 48  # tokens
SHOWN, COMPARED = 3, 20  # held-out questions whose answers are shown; general ones, compared
FEW_ROWS = 20  # so few chats are learned by heart
COSTS_NOTHING = 0.05  # nats per token: a smaller rise of the general loss is no loss


@dataclass
class General:
    """Chats that have nothing to do with the skill; either may be missing.

    ``holding`` rows hold the skill to its base in training. ``judging`` rows tell what it costs:
    they are none of those, and none that the base has learned.
    """

    holding: ChatSamples | None = None
    judging: ChatSamples | None = None


def plugged(options: TrainOptions, base: Base, data: SFTDataset, runtime: Runtime) -> dict:
    """What makes a run of ``run_stage`` keep what ``base``, which carries a LoRA, could do before.

    Raises ``UserError`` as ``read_general`` does.
    """
    model, tokenizer = base.model, base.tokenizer
    general = read_general(options, base, runtime)
    kinds = {"domain": data.val}, tokenizer, options, runtime, general.judging
    validation = validation_of(model, *kinds)
    if not options.dry_run:
        runtime.on_first(lambda: validation(step=0))
    judged = tokenizer, options, data, general, validation
    return {
        "validation": validation,
        "verdict": partial(verdict, model, *judged),
        "loss_sum": partial(skill_loss_sum, base=model),
        "holding": general.holding,
    }


def read_general(options: TrainOptions, base: Base, runtime: Runtime) -> General:
    """The chats of ``options.general_data``, without those that ask what the skill teaches.

    Without such files, those are the bundled chats, or what a base of other makers answers to
    their questions itself: ``options`` get the file. With ``keep`` 0 nothing is held, and chats
    that the base's template cannot show stop no run. Else raises ``UserError`` where none is left.
    """
    if not options.general_data:
        file = own_answers(base, options, runtime) if is_pretrained(base.path) else BUNDLED
        options.general_data = (file,)
    files = data_files(options.general_data)
    general = replace(options, data_path=options.general_data, bad_rows="skip", patience=0)
    general.val_ratio, is_learned = judging_share(base, files, options)
    try:
        data = read_data(SFTDataset, general, base.tokenizer, runtime)
    except UserError as error:
        if options.keep:
            way_out = "name other chats, or train without them by keep=0"
            raise UserError(f"general_data: {error}; {way_out}") from error
        print(f"note: what the skill costs in general is not measured: {error}")
        return General()
    unwanted = alike(files, options.data_path)
    holding, judging = data.train.without(unwanted), data.val.without(unwanted)
    count = sum(len(samples.lengths) for samples in (data.train, data.val))
    count -= len(holding.lengths) + len(judging.lengths)
    if count:
        print(f"  {count} of them are left out: they ask what the skill teaches")
    if options.keep and not len(holding.lengths):
        every = "every chat of general_data asks what the skill teaches"
        raise UserError(f"{every}: name other chats, or train without them by keep=0")
    if is_learned:
        print(f"note: {base.path} was trained without held-out rows: no general chat can judge")
    judges = len(judging.lengths) and not is_learned
    return General(holding if options.keep else None, judging if judges else None)


def judging_share(base: Base, files: list[Path], options: TrainOptions) -> tuple[float, bool]:
    """The share of these general rows that judges, and whether the base has learned those too.

    It is the share that the base's own run held out, if it learned from one of the files.
    """
    cache = cache_dir(options.out_dir)
    learned = {entry.get("sha256") for entry in base.record.data}
    if not learned & {sha256_file(file, cache) for file in files}:
        return JUDGING_SHARE, False
    return base.held_out_share, base.record.val_ratio == 0


def alike(general: list[Path], own: tuple[Path, ...]) -> np.ndarray:
    """The digests, int64, of general chats with a question that is ``ALIKE`` one of the skill's."""
    asked = Neighbours(question for chat in chats_in(own) for question in questions_in(chat))
    found = [
        digest({"conversations": chat})
        for chat in chats_in(general)
        if any(asked.similarity(question) > ALIKE for question in questions_in(chat))
    ]
    return np.array(found, np.int64)


def own_answers(base: Base, options: TrainOptions, runtime: Runtime) -> Path:
    """A file of bundled questions with the base's own likeliest answers, made once for each base.

    A skill must not bring the bundled answers of a toy to a model of other makers.
    """
    known = f"{base.record.fingerprint[:16]}{'-4bit' if options.load_in_4bit else ''}"
    path, tokenizer = cache_dir(options.out_dir) / f"answers-{known}.jsonl", base.tokenizer
    with runtime.first_alone():
        if path.is_file():
            return path
        questions = list(dict.fromkeys(questions_in(chat)[0] for chat in chats_in((BUNDLED,))))
        questions = questions[:: max(1, len(questions) // ASKED)][:ASKED]
        print(f"asking {base.path} {len(questions)} general questions, once", flush=True)
        lines = []
        for question in questions:
            turn = {"role": "user", "content": question}
            ids, _ = encode_chat(tokenizer, [turn], add_generation_prompt=True)
            with without_lora(base.model):
                answered = likeliest(base.model, ids, tokenizer)
            text = tokenizer.decode(answered, skip_special_tokens=True)
            answer = {"role": "assistant", "content": text.strip()}
            if answer["content"]:
                lines.append(json.dumps({"conversations": [turn, answer]}) + "\n")
        atomic_write(path, lambda file: file.write("".join(lines).encode()))
    return path


def likeliest(model: nn.Module, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The greedy answer to the prompt ``ids``: at most ``LONGEST_ANSWER`` ids, without its end."""
    sampling = Sampling(temperature=0.0, max_new_tokens=LONGEST_ANSWER)
    return list(generate(model, ids, sampling, ends_of_answer(tokenizer), torch.Generator()))


def skill_loss_sum(model: nn.Module, batch: Batch, *, base: nn.Module) -> Tensor:
    """The cross-entropy of a skill's own rows; on general ones, how far it is from its base."""
    if batch.kind == KEEP:
        return keep_sum(model, base, batch.inputs, batch.labels)
    return causal_loss_sum(model, batch)


@torch.compiler.set_stance("force_eager")
def verdict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    data: SFTDataset,
    general: General,
    validation: Validation,
) -> dict:
    """Print what the applied skill has learned and what it costs; returns it for its record."""
    was_training = model.training
    model.eval()
    shown = [
        {"question": questions_in(chat)[-1], "before": before, "after": after}
        for chat in spread(chats_of(data.val, options.data_path), SHOWN)
        for before, after in [answers(model, tokenizer, chat)]
    ]
    others = spread(chats_of(general.judging, options.general_data), COMPARED)
    pairs = [answers(model, tokenizer, chat) for chat in others]
    model.train(was_training)
    changed = sum(before != after for before, after in pairs)
    losses = {}
    print(f"\n{'what was learned':24}{'before':>10}{'after':>10}")
    for kind, result in validation.results.items():
        if result:
            losses[kind] = result["first"], result.get("best", result["last"])
            before, after = (each["loss"] for each in losses[kind])
            print(f"{kind + ' loss, nats/token':24}{before:10.4f}{after:10.4f}")
    if pairs:
        print(f"general answers changed: {changed} of {len(pairs)}")
    for each in shown:
        print(f"> {each['question']}\n  before: {each['before']}\n  after:  {each['after']}")
    sentence = summary_of(losses, changed, len(pairs))
    for text in (sentence, *warnings_on(data.train)):
        print(text)
    told = {"sentence": sentence, "general_answers": len(pairs), "changed": changed}
    return {"verdict": told | {"answers": shown}}


def summary_of(losses: dict[str, tuple[dict, dict]], changed: int, asked: int) -> str:
    """One plain sentence on the results before and after training."""
    if "domain" not in losses:
        return "nothing was held out, so nobody can tell what was learned: raise val_ratio"
    before, after = (result["loss"] for result in losses["domain"])
    if after > 0.98 * before:
        way_out = "raise learning_rate or epochs, or give more rows"
        return (
            f"learned nothing: the held-out loss went from {before:.3f} to {after:.3f}; {way_out}"
        )
    if "general" not in losses:
        return "learned; what it costs in general was not measured"
    first, last = (result["loss"] for result in losses["general"])
    if last - first > COSTS_NOTHING or changed > asked / 10:
        cost = f"the general loss rose by {last - first:.3f}, {changed} of {asked} answers changed"
        return f"learned, but {cost}: raise keep or keep_rows, or train for fewer epochs"
    return "learned; costs nothing measurable"


def warnings_on(own: ChatSamples) -> list[str]:
    """What makes rows poor teachers: too few of them, and one question with several answers."""
    found, answered = [], defaultdict(set)
    for n in range(len(own.lengths)):
        row = own[n]
        first = int(np.argmax(row % 2))  # of the learned tokens
        answered[row[:first].tobytes()].add(row[first:].tobytes())
    if len(own.lengths) < FEW_ROWS:
        found.append(f"warning: {len(own.lengths)} rows are few: it may know them by heart only")
    if several := sum(len(different) > 1 for different in answered.values()):
        found.append(f"warning: {several} questions have more than one answer in the rows")
    return found


def chats_of(samples: ChatSamples | None, paths: tuple[Path, ...]) -> list[list[dict]]:
    """The chats of these files that are among ``samples``."""
    if samples is None or not len(samples.lengths):
        return []
    wanted = set(samples.rows.rows["digest"][samples.rows.chosen].tolist())
    return [chat for chat in chats_in(paths) if digest({"conversations": chat}) in wanted]


def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, chat: list[dict]
) -> tuple[str, str]:
    """What the base and what the model with its LoRA says to the last question of ``chat``."""
    last = max(n for n, message in enumerate(chat) if message["role"] == "user")
    ids, _ = encode_chat(tokenizer, chat[: last + 1], add_generation_prompt=True)
    with without_lora(model):
        before = likeliest(model, ids, tokenizer)
    both = before, likeliest(model, ids, tokenizer)
    return tuple(tokenizer.decode(each, skip_special_tokens=True).strip() for each in both)


def spread(items: list, count: int) -> list:
    """At most ``count`` of them, evenly spread."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]
