"""PEFT's side of bench_train.py: PEFT's LoRA under the Hugging Face Trainer, padding by the batch.

python peft_child.py JOB.json

The model is transformers' Llama with our weights, or our own, whose forward pass does part of what
makes our side fast.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.training.child import Orders, bare_mib, memory_mib, sgemm_gflops
from benchmarks.training.llama import TARGETS, llama_of, lora_of_llama
from dataset.chat import encode_chats
from dataset.tokenizer import load_tokenizer
from model.LMConfig import LMConfig
from model.weights import model_of, read_tensors


class Rows(torch.utils.data.Dataset):
    """Chats as ids and labels, encoded by our encoder, so that the supervised targets are the
    same.
    """

    def __init__(self, tokenizer, path: str, max_seq_len: int):
        self.tokenizer, self.path, self.max_seq_len = tokenizer, path, max_seq_len
        self.encode()

    def encode(self) -> None:
        with open(self.path, encoding="utf-8") as file:
            chats = [json.loads(line)["conversations"] for line in file]
        self.rows = []
        for ids, learned in encode_chats(self.tokenizer, chats):
            ids, learned = (
                torch.tensor(ids[: self.max_seq_len]),
                torch.tensor(learned[: self.max_seq_len]),
            )
            self.rows.append({"input_ids": ids, "labels": ids.masked_fill(~learned, -100)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class Rounds(TrainerCallback):
    """Makes each epoch a round: it waits for the order and answers it."""

    def __init__(self, orders: Orders, model, rows: Rows, bare: float):
        self.orders, self.model, self.rows = iter(orders), model, rows
        self.reply = orders.reply
        self.targets = self.slots = 0
        self.bare = bare
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs) -> None:
        self.targets += int((kwargs["labels"][:, 1:] != -100).sum())
        self.slots += kwargs["labels"].numel()

    def on_epoch_begin(self, args, state, control, **others) -> None:
        for order in self.orders:
            if order["do"] == "save":
                save(self.model, order["path"])
                self.reply()
                continue
            self.order = order
            self.targets = self.slots = 0
            self.first_step, self.began = state.global_step, time.perf_counter()
            self.rows.path = self.order["data"]
            self.rows.encode()
            return
        raise SystemExit(0)

    def on_epoch_end(self, args, state, control, **others) -> None:
        counts = {
            "targets": self.targets,
            "slots": self.slots,
            "steps": state.global_step - self.first_step,
        }
        spent = time.perf_counter() - self.began
        rate = sgemm_gflops() if self.order.get("sgemm") else None
        memory = {"bare_mib": self.bare, "peak_mib": memory_mib(peak=True)}
        self.reply(seconds=spent, sgemm=rate, **counts, **memory)


def save(model, path: str) -> None:
    """Our LoRA file's keys; rank and alpha are equal, so the scale is 1 there too."""
    if model.config.model_type == "llama":
        torch.save(lora_of_llama(model, model.config.head_dim), path)
        return
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            module, letter = name.rsplit(".lora_", 1)
            tensors[f"{module}.lora.{letter}.weight"] = parameter.detach()
    torch.save(tensors, path)


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=0)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "labels": labels}


def main(job: dict, orders: Orders) -> None:
    rows = Rows(load_tokenizer(job["tokenizer"]), job["data"], job["max_seq_len"])
    bare = bare_mib()
    config, tensors = LMConfig(**job["config"]), read_tensors(job["weights"])
    llama = job["model"] == "llama"
    model = llama_of(config, tensors) if llama else model_of(config, tensors, job["weights"])
    targets = (
        TARGETS if llama else ["wq", "wo"]
    )  # the modules that MiniMind's rule (square matrices) chooses
    model = get_peft_model(
        model, LoraConfig(r=job["rank"], lora_alpha=job["rank"], target_modules=targets)
    )
    arguments = TrainingArguments(
        output_dir=job["folder"],
        per_device_train_batch_size=job["batch_size"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="cosine",
        num_train_epochs=job["epochs"]
        + 1,  # one more begins, so that the orders after the last round are heard
        optim="adamw_torch_fused",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=1337,
    )
    rounds = Rounds(orders, model, rows, bare)
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=collate, callbacks=[rounds]
    )
    trainer.train()


if __name__ == "__main__":
    orders = Orders()
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), orders)
