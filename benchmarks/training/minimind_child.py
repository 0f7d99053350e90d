"""MiniMind's side of bench_train.py: its model, its datasets and its training step, from a checkout
of April 2025.

    python -I minimind_child.py CHECKOUT JOB.json

A process of its own because MiniMind's package is called ``model`` too. Its mixed precision and
loss scaling do nothing on a CPU and are left out; so are its saves and log lines, which it pays for
and we do not charge.
"""

import ctypes
import importlib.util
import json
import math
import os
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import torch
from child import Orders, bare_mib, memory_mib, sgemm_gflops
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from transformers.modeling_utils import (
    load_state_dict,
)  # torch.load of weights alone, whatever torch's default is


class Side:
    """``job``: rows (text or chat), data, weights, config, tokenizer, rank (0: all weights),
    checkpoint and the flags batch_size, accumulation_steps, num_workers, learning_rate, epochs,
    max_seq_len of MiniMind's scripts. planned_seconds: the learning rate falls over so much time;
    0: over the epochs, as in its scripts."""

    def __init__(self, checkout: str, job: dict):
        sys.path.insert(0, checkout)
        if (
            importlib.util.find_spec("sklearn") is None
        ):  # imported by its dataset file, never used there
            stand_in = types.ModuleType("sklearn.model_selection")
            stand_in.train_test_split = None
            sys.modules |= {"sklearn": types.ModuleType("sklearn"), stand_in.__name__: stand_in}
        from model import dataset, model, model_lora  # MiniMind's, as is the next one
        from model.LMConfig import LMConfig

        assert model.__file__.startswith(checkout), "another package `model` came first"
        self.job, self.lora = job, model_lora
        self.kinds = {"text": dataset.PretrainDataset, "chat": dataset.SFTDataset}
        self.tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"], local_files_only=True)
        torch.manual_seed(1337)
        self.bare = bare_mib()
        self.model = model.MiniMindLM(
            LMConfig(**job["config"] | {"max_seq_len": job["max_seq_len"]})
        )
        self.model.load_state_dict(load_state_dict(job["weights"]), strict=True)
        if job["rank"]:
            model_lora.apply_lora(self.model, job["rank"])
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad = "lora" in name
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.clipped = self.parameters if job["rank"] else list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=job["learning_rate"])
        self.cross_entropy = nn.CrossEntropyLoss(reduction="none")
        self.micro_step = self.targets = self.beyond = self.slots = 0
        self.clock = 0.0

    def loader(self, path: str) -> DataLoader:
        rows = self.kinds[self.job["rows"]](
            path, self.tokenizer, max_length=self.job["max_seq_len"]
        )
        if (
            self.job["rows"] == "chat"
        ):  # it looks for the turns of its own tokenizer; these are ours
            rows.bos_id = self.tokenizer(
                f"{self.tokenizer.bos_token}assistant", add_special_tokens=False
            ).input_ids
            rows.eos_id = [self.tokenizer.eos_token_id]
        workers = {"num_workers": self.job["num_workers"], "worker_init_fn": release_memory}
        return DataLoader(rows, batch_size=self.job["batch_size"], **workers)

    def step(self, x: Tensor, y: Tensor, mask: Tensor, micro_steps: int) -> None:
        """One micro-batch of a run of ``micro_steps``, and the update when enough of them are
        accumulated.
        """
        peak, accumulation = self.job["learning_rate"], self.job["accumulation_steps"]
        spent, planned = self.clock + time.perf_counter() - self.began, self.job["planned_seconds"]
        # A timed run may go past the planned end.
        through = min(1.0, spent / planned if planned else self.micro_step / micro_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = peak / 10 + 0.5 * peak * (1 + math.cos(math.pi * through))
        out = self.model(x)
        losses = self.cross_entropy(out.logits.view(-1, out.logits.size(-1)), y.view(-1)).view(
            y.size()
        )
        loss = ((losses * mask).sum() / mask.sum() + out.aux_loss) / accumulation
        loss.backward()
        self.micro_step += 1
        if self.micro_step % accumulation == 0:
            nn.utils.clip_grad_norm_(self.clipped, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.targets += int(mask.sum())
        self.beyond += int((mask.bool() & (x == self.tokenizer.eos_token_id)).sum())
        self.slots += x.numel()

    def follow(self, orders: Orders) -> None:
        endless = None
        for order in orders:
            self.targets = self.beyond = self.slots = 0
            before, self.began = self.micro_step, time.perf_counter()
            if order["do"] == "save":
                self.save(order["path"])
            elif order["do"] == "checkpoint":
                torch.save(self.state(), f"{order['path']}.new")
                os.replace(f"{order['path']}.new", order["path"])
            elif order["do"] == "resume":
                self.resume(order["path"])
                before, self.began = self.micro_step, time.perf_counter()
            elif order["do"] == "train_for":
                endless = endless or self.endless()
                while time.perf_counter() - self.began < order["seconds"]:
                    self.step(*next(endless))
            else:
                loader = self.loader(order["data"])
                for x, y, mask in loader:
                    self.step(x, y, mask, self.job["epochs"] * len(loader))
            spent = time.perf_counter() - self.began
            self.clock += spent if order["do"] in ("train_for", "round") else 0.0
            # Beyond: it also learns the newline that its template puts after an end of turn.
            counts = {
                "targets": self.targets - self.beyond,
                "beyond_end_of_turn": self.beyond,
                "slots": self.slots,
            }
            rate = sgemm_gflops() if order.get("sgemm") else None
            memory = {"bare_mib": self.bare, "peak_mib": memory_mib(peak=True)}
            steps = (
                self.micro_step // self.job["accumulation_steps"]
                - before // self.job["accumulation_steps"]
            )
            orders.reply(
                seconds=spent, clock=self.clock, sgemm=rate, steps=steps, **counts, **memory
            )

    def endless(self) -> Iterator[tuple]:
        """Micro-batches from where ``micro_step`` stands, epoch after epoch, each with the run's
        length.
        """
        loader = self.loader(self.job["data"])
        skip = self.micro_step % len(loader)
        while True:
            for number, batch in enumerate(loader):
                if number >= skip:
                    yield *batch, self.job["epochs"] * len(loader)
            skip = 0

    def save(self, path: str) -> None:
        if self.job["rank"]:
            self.lora.save_lora(self.model, path)
        else:
            torch.save(self.model.state_dict(), path)

    def state(self) -> dict:
        optimizer = self.optimizer.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "at": [self.micro_step, self.clock],
        }

    def resume(self, path: str) -> None:
        state = load_state_dict(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.micro_step, self.clock = state["at"]


def release_memory(worker: int) -> None:
    """Forked late, a round's worker holds gigabytes that its parent has freed; the one of a whole
    run does not.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


if __name__ == "__main__":
    orders = Orders()
    Side(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))).follow(orders)
