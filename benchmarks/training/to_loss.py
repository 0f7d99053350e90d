"""Wall-clock to the best validation loss that MiniMind reaches in a given time; pretraining, and
LoRA.

The sides run one after another; an interrupted measurement goes on from MiniMind's last check.
"""

import importlib
import json
from pathlib import Path

from benchmarks.training.data import Score, chats, documents, initial_weights, write_chats
from benchmarks.training.sides import STEELMAN, Side, Sides
from core.errors import UserError
from core.files import atomic_write, sha256_file
from core.paths import TOKENIZER_DIR
from dataset.tokenizer import load_tokenizer

CHECKS = 10  # evaluations of MiniMind's run, evenly spread; they do not count as time
OUR_CHECKS = 60  # of ours in the same time
RANK = 16
ADAMW = {
    "optimizer": "adamw",
    "batch_size": 1,
    "learning_rate": 1e-3,
}  # the best of results/sweep_recipe.json


def time_to_loss(options, folder: Path) -> dict:
    """Pretraining from the same seeded weights on the same documents, in one random order for
    all.
    """
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    texts = documents(options.pretrain)
    held_out = max(1, min(len(texts) // 50, 200))
    train, val = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, chosen in ((val, texts[:held_out]), (train, texts[held_out:])):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen)
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return _race(options, folder, "text", train, val, tokenizer)


def lora_to_loss(options, folder: Path) -> dict:
    """LoRA on ``--identity``, from ``--base``."""
    if options.base is None:
        raise UserError(
            "--only lora_to_loss needs --base FILE, a chat base: on random weights a skill means nothing"
        )
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    rows = chats(options.identity, tokenizer, options.max_seq_len, 0)
    held_out = max(1, len(rows) // 10)
    train, val = folder / "train.jsonl", folder / "held_out.jsonl"
    write_chats(val, rows[:held_out], tokenizer, options.max_seq_len)
    write_chats(train, rows[held_out:], tokenizer, options.max_seq_len)
    return _race(options, folder, "chat", train, val, tokenizer)


def _race(options, folder: Path, rows: str, train: Path, val: Path, tokenizer) -> dict:
    weights, config = initial_weights(options, tokenizer, folder)
    score = Score(options, rows, val, tokenizer, weights, config, folder)
    sides = Sides(options, rows, weights, config, folder)
    budget, rank = 60 * options.minutes, RANK if rows == "chat" else 0
    files = "-".join(
        sha256_file(path)[:8] for path in (train, val, weights)
    )  # one measurement resumes no other
    work = (
        options.work / f"{rows}-{files}-{options.minutes:g}-{options.val_tokens}-{options.threads}"
    )
    curves = {}
    # The steelman's learning rate has fallen when its time is over; as shipped it is planned for
    # the epochs.
    for name, flags in (("steelman", STEELMAN | {"planned_seconds": budget}), ("shipped", {})):
        with sides.minimind(name, train, rank, **flags) as side:
            curves[name] = _resumable(side, score, work, budget, rank)
    best = {name: min(curve, key=lambda point: point["loss"]) for name, curve in curves.items()}
    door = "train_lora" if rank else "train_pretrain"
    variants = {"ours": ({}, options.our_rows)}
    if not rank:
        variants["ours with AdamW"] = ADAMW, options.adamw_rows
    wanted, reached = min(point["loss"] for point in best.values()), {}
    for name, (flags, planned_rows) in variants.items():
        chosen = importlib.import_module(door).Options(**flags)
        flags = flags | {"max_steps": planned_rows // chosen.batch_size}
        with sides.ours(name, door, train, chosen.epochs, **flags) as side:
            curves[name] = _until(wanted, side, score, work, budget, rank)
        reached[name] = {
            other: _first_below(curves[name], point["loss"]) for other, point in best.items()
        }
    return {
        "minutes": options.minutes,
        "start_loss": curves["ours"][0]["loss"],
        "our_planned_rows": {name: rows for name, (_, rows) in variants.items()},
        "their_best": best,
        "our_seconds_to_it": reached,
        "speed_over": {
            name: {
                other: round(best[other]["seconds"] / spent, 2) if spent else None
                for other, spent in seconds.items()
            }
            for name, seconds in reached.items()
        },
        "curves": curves,
    }


def _until(
    wanted: float, side: Side, score: Score, work: Path, budget: float, rank: int
) -> list[dict]:
    """Our curve, until it is at the loss ``wanted``, or time or the planned steps are over."""
    curve = [_check(side, score, work, rank, {"clock": 0.0})]
    while curve[-1]["loss"] > wanted and curve[-1]["seconds"] < budget:
        answer = side.ask("train_for", seconds=budget / OUR_CHECKS)
        if not answer["steps"]:
            break
        curve.append(_check(side, score, work, rank, answer))
        print(f"{side.name}: {curve[-1]}", flush=True)
    return curve


def _resumable(side: Side, score: Score, work: Path, budget: float, rank: int) -> list[dict]:
    """The side's curve up to ``budget`` seconds of training; an interrupted run goes on from its
    last check.
    """
    work.mkdir(parents=True, exist_ok=True)
    record, checkpoint = work / f"{side.name}.json", work / f"{side.name}.ckpt"
    curve = []
    if record.is_file() and checkpoint.is_file():
        curve = json.loads(record.read_text(encoding="utf-8"))
        side.ask("resume", path=str(checkpoint))
    while not curve or curve[-1]["seconds"] < budget:
        answer = side.ask("train_for", seconds=budget / CHECKS) if curve else {"clock": 0.0}
        curve.append(_check(side, score, work, rank, answer))
        side.ask("checkpoint", path=str(checkpoint))
        text = json.dumps(curve)
        atomic_write(record, lambda file, text=text: file.write(text.encode()))
        print(f"{side.name}: {curve[-1]}", flush=True)
    return curve


def _check(side: Side, score: Score, work: Path, rank: int, answer: dict) -> dict:
    path = work / f"{side.name}.pth"
    side.ask("save", path=str(path))
    loss = score(lora=path, rank=rank) if rank else score(weights=path)
    return {"seconds": round(answer["clock"], 1), "loss": round(loss, 4)}


def _first_below(curve: list[dict], loss: float) -> float | None:
    return next((point["seconds"] for point in curve if point["loss"] <= loss), None)
