"""What LoRA saves beside full fine-tuning, both ours: time of a step, memory, and the published
comparison.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.training.data import chats, document_files, documents, initial_weights, write_chats
from benchmarks.training.measure import ratios, spread
from benchmarks.training.sides import Sides, all_of, take_turns
from core.paths import TOKENIZER_DIR
from dataset.tokenizer import load_tokenizer

MEMORY_SHAPES = (
    (1, 0.5),
    (1, 1.0),
    (4, 1.0),
)  # rows, length over --max_seq_len: 1 x 256, 1 x 512, 4 x 512
MEMORY_STEPS = 4


def memory(options, folder: Path) -> dict:
    """Peak memory above the bare process (imports done, data ready, no model yet) on full windows.

    Each figure is a process of its own, ``--rounds`` times: how much an allocator keeps is not the
    same twice.
    """
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    weights, config = initial_weights(options, tokenizer, folder)
    texts = documents(options.pretrain)
    file = document_files(
        texts, "full", tokenizer, options.max_seq_len, 1, 4 * MEMORY_STEPS, folder
    )[0]
    figures = {}
    for rows, share in MEMORY_SHAPES:
        length = round(options.max_seq_len * share)
        flags = {"batch_size": rows, "max_seq_len": length, "optimizer": "adamw"}
        peaks = {"full": [], "lora": []}
        for turn in range(options.rounds):
            for name, door in (("full", "train_pretrain"), ("lora", "train_lora")):
                (place := folder / f"{name}-{rows}-{length}-{turn}").mkdir()
                sides = Sides(options, "text", weights, config, place)
                with sides.ours(name, door, file.path, MEMORY_STEPS, **flags) as side:
                    answer = side.ask("steps", count=MEMORY_STEPS)
                peaks[name].append(answer["peak_mib"] - answer["bare_mib"])
        figures[f"{rows} x {length}"] = {
            "full_mib": spread(peaks["full"], 1),
            "lora_mib": spread(peaks["lora"], 1),
            "lora_of_full": ratios(peaks["lora"], peaks["full"]),
        }
    return {"optimizer_steps": MEMORY_STEPS, "rounds": options.rounds, **figures}


def full_vs_lora(options, folder: Path) -> dict:
    """The comparison that is usually published, measured: both fine-tune the same base on the same
    chats.
    """
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    weights, config = initial_weights(options, tokenizer, folder)
    every = chats(options.medical, tokenizer, options.max_seq_len, 0)
    chosen = every[: options.chat_rows or None]
    file = write_chats(folder / "train.jsonl", chosen, tokenizer, options.max_seq_len)
    sides = Sides(options, "chat", weights, config, folder)
    doors = {"full": "train_full_sft", "lora": "train_lora"}
    running = [sides.ours(name, door, file.path, options.rounds) for name, door in doors.items()]
    with all_of(*running):
        answers = take_turns(
            running, [file.path] * options.rounds, sgemm=False
        )  # its matrices are memory too
    table = {}
    for name, rounds in answers.items():
        hours = spread((answer["seconds"] * len(every) / file.rows / 3600 for answer in rounds), 4)
        table[name] = {
            "trained_parameters": rounds[0]["parameters"],
            "peak_mib": round(rounds[-1]["peak_mib"] - rounds[-1]["bare_mib"], 1),
            "hours_per_epoch": hours,
            "cost_per_epoch": round(hours["median"] * options.price_per_hour, 5),
        }
    times = {name: [answer["seconds"] for answer in rounds] for name, rounds in answers.items()}
    return {
        "rows": file.rows,
        "rows_of_file": len(every),
        "price_per_hour": options.price_per_hour,
        "rounds": options.rounds,
        **table,
        "lora_of_full": {
            "trained_parameters": round(
                table["lora"]["trained_parameters"] / table["full"]["trained_parameters"], 5
            ),
            "peak_mib": round(table["lora"]["peak_mib"] / table["full"]["peak_mib"], 3),
            "time": ratios(times["lora"], times["full"]),
        },
    }


def lora_step(options, folder: Path) -> dict:
    """Optimizer steps on the very same batches: LoRA, full, and full with the head at every
    position.
    """
    import train_full_sft
    import train_lora
    from dataset.batches import PretrainDataset, SFTDataset
    from model.LMConfig import LMConfig
    from model.loss import loss_sum
    from model.model import MiniMindLM
    from model.model_lora import apply_lora
    from model.weights import read_tensors
    from trainer.optimizer import MuonAdamW, param_groups
    from trainer.runtime import Runtime
    from trainer.stage import batches_of, read_data

    tokenizer = load_tokenizer(TOKENIZER_DIR)
    weights, config = initial_weights(options, tokenizer, folder)
    texts = documents(options.pretrain)
    full_rows = document_files(
        texts, "full", tokenizer, options.max_seq_len, 1, options.rows, folder
    )[0]
    chosen = chats(options.medical, tokenizer, options.max_seq_len, options.chat_rows)
    chat_rows = write_chats(folder / "chats.jsonl", chosen, tokenizer, options.max_seq_len)

    def whole_loss_sum(model, batch):
        logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(
            logits, batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

    figures = {}
    for name, kind, file in (
        ("windows", PretrainDataset, full_rows),
        ("chats", SFTDataset, chat_rows),
    ):
        settings = {
            "data_path": (file.path,),
            "out_dir": folder / name,
            "val_ratio": 0.0,
            "device": "cpu",
        }
        door = train_lora.Options(max_seq_len=options.max_seq_len, **settings)
        runtime = Runtime.start(door.device, door.dtype, door.seed)
        data = read_data(kind, door, tokenizer, runtime).train
        batches = [
            step
            for epoch in range(1 + options.rounds)
            for step in batches_of(data, door, runtime).steps(epoch)
        ]
        whole = max(sum(len(batch.labels) for batch in step) for step in batches)
        batches = [
            step for step in batches if sum(len(batch.labels) for batch in step) == whole
        ]  # no last, small ones
        runners = {}
        for side, loss in (
            ("lora", loss_sum),
            ("full", loss_sum),
            ("full_untrimmed", whole_loss_sum),
        ):
            model = MiniMindLM(LMConfig(**config))
            model.load_state_dict(read_tensors(weights))
            options_of = door if side == "lora" else train_full_sft.Options()
            if side == "lora":
                apply_lora(model, door.rank, door.alpha)
            groups = param_groups(model, options_of.weight_decay)
            optimizer = MuonAdamW(groups, 1e-5)
            runners[side] = (
                model.train(),
                [p for group in groups for p in group["params"]],
                optimizer,
                loss,
            )
        times = {side: [] for side in runners}
        for step in batches[: 1 + options.rounds]:
            for side, (model, parameters, optimizer, loss) in runners.items():
                began = time.perf_counter()
                targets = sum(batch.n_targets for batch in step)
                for batch in step:
                    (loss(model, runtime.move(batch)) / targets).backward()
                torch.nn.utils.clip_grad_norm_(parameters, door.grad_clip or math.inf)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                times[side].append(time.perf_counter() - began)
        times = {side: values[1:] for side, values in times.items()}  # the first one allocates
        measured = [batch for step in batches[1 : 1 + options.rounds] for batch in step]
        supervised = sum(batch.n_targets for batch in measured) / sum(
            batch.n_tokens for batch in measured
        )
        figures[name] = {
            "rounds": len(times["lora"]),
            "supervised_share": round(supervised, 3),
            "seconds": {side: spread(values) for side, values in times.items()},
            "lora_of_full": ratios(times["lora"], times["full"]),
            "lora_of_full_untrimmed": ratios(times["lora"], times["full_untrimmed"]),
        }
    return figures
