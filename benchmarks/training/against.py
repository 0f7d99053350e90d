"""Useful tokens a second beside MiniMind and PEFT: pretraining on documents, LoRA on chats."""

from pathlib import Path

from benchmarks.training.data import (
    Score,
    chats,
    document_files,
    documents,
    initial_weights,
    write_chats,
)
from benchmarks.training.sides import STEELMAN, Sides, all_of, compare, take_turns
from core.paths import TOKENIZER_DIR
from dataset.tokenizer import load_tokenizer

DOCUMENTS = ("mean 0.45", "as they are", "full")  # of --max_seq_len; see document_files
RANK = 16


def pretrain(options, folder: Path) -> dict:
    """The same documents for MiniMind as shipped, its steelman, and us with Muon and AdamW; three
    mixtures of lengths.

    A round is ``--rows`` documents, from the file on: reading and tokenising count. MiniMind as
    shipped updates once in eight micro-batches of 32, so that a round holds a part of its step, and
    it is charged for no more.
    """
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    texts = documents(options.pretrain)
    figures = {}
    for number, kind in enumerate(DOCUMENTS):
        (place := folder / str(number)).mkdir()
        weights, config = initial_weights(options, tokenizer, place)
        files = document_files(
            texts, kind, tokenizer, options.max_seq_len, options.rounds, options.rows, place
        )
        sides = Sides(options, "text", weights, config, place)
        first = files[0].path
        ours = sides.ours("ours", "train_pretrain", first, options.rounds)
        adamw = sides.ours(
            "ours with AdamW", "train_pretrain", first, options.rounds, optimizer="adamw"
        )
        steelman = sides.minimind("minimind steelman", first, 0, **STEELMAN)
        shipped = sides.minimind("minimind shipped", first, 0)
        with all_of(ours, adamw, steelman, shipped):
            answers = take_turns([ours, adamw, steelman, shipped], [file.path for file in files])
        tokens = [file.tokens for file in files]
        length = {
            "mean_length": round(sum(tokens) / len(tokens) / options.rows, 1),
            "rows_per_round": options.rows,
        }
        figures[f"documents {kind}"] = length | compare(answers, tokens)
        figures[f"documents {kind}"]["adamw_speed_over"] = compare(answers, tokens, adamw.name)[
            "speed_over"
        ]
    return figures


def lora(options, folder: Path) -> dict:
    """The same chats for MiniMind as shipped, its steelman, PEFT with the Trainer, and us; a round
    is an epoch.

    PEFT adapts transformers' Llama with the same weights, and once more our own model.
    """
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    figures = {}
    for skill, path in (("identity", options.identity), ("medical", options.medical)):
        (place := folder / skill).mkdir()
        weights, config = initial_weights(options, tokenizer, place)
        limit = options.chat_rows
        every = chats(path, tokenizer, options.max_seq_len, 0)
        held_out = max(1, min(len(every) // 10, 50))
        chosen = every[held_out:][: limit or None]
        train_file = write_chats(place / "train.jsonl", chosen, tokenizer, options.max_seq_len)
        write_chats(place / "held_out.jsonl", every[:held_out], tokenizer, options.max_seq_len)
        sides = Sides(options, "chat", weights, config, place)
        data, rounds = train_file.path, options.rounds
        running = [sides.ours("ours", "train_lora", data, rounds)]
        if options.minimind is not None:
            running.append(sides.minimind("minimind shipped", data, RANK, epochs=rounds))
            running.append(
                sides.minimind("minimind steelman", data, RANK, epochs=rounds, **STEELMAN)
            )
        if options.peft:
            flags = door_flags(options, "train_lora")
            for name, model in (("peft", "llama"), ("peft on our model", "ours")):
                running.append(sides.peft(name, data, rounds, rank=RANK, model=model, **flags))
        with all_of(*running):
            answers = take_turns(running, [data] * rounds)
            files = {side.name: place / f"{side.name}.pth" for side in running}
            for side in running:
                side.ask("save", path=str(files[side.name]))
        score = Score(options, "chat", place / "held_out.jsonl", tokenizer, weights, config, place)
        compared = compare(answers, [train_file.tokens] * rounds)
        figures[skill] = {
            "rows": train_file.rows,
            "rows_of_file": len(every),
            "mean_length": round(train_file.tokens / train_file.rows, 1),
            **compared,
            "held_out_loss": {"before": round(score(), 4)}
            | {name: round(score(lora=file, rank=RANK), 4) for name, file in files.items()},
            # The rate on the rows above times the rows of the file; measured where they are all of
            # them.
            "hours_per_epoch_of_file": {
                side: round(
                    figure["seconds_per_round"]["median"] * len(every) / train_file.rows / 3600, 4
                )
                for side, figure in compared["sides"].items()
            },
        }
    return figures


def door_flags(options, door: str) -> dict:
    """What PEFT's side shares with our door: its batch and its learning rate."""
    import importlib

    defaults = importlib.import_module(door).Options()
    return {"batch_size": defaults.batch_size, "learning_rate": defaults.learning_rate}
