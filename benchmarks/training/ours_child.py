"""Our side of bench_train.py: a training door's own parts and defaults, with an order between its
steps.

python ours_child.py JOB.json
"""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.training.child import Orders, bare_mib, memory_mib, sgemm_gflops
from benchmarks.training.measure import Paced, train_paced
from dataset.batches import PretrainDataset, SFTDataset
from dataset.tokenizer import load_tokenizer
from model.LMConfig import LMConfig
from model.loss import loss_sum
from model.model_lora import apply_lora, save_lora
from model.weights import model_of, read_tensors
from trainer.runtime import Runtime, count_parameters
from trainer.stage import batches_of, read_data

DATASETS = {"text": PretrainDataset, "chat": SFTDataset}


class Side:
    """``job``: door (module name), flags of it, rows (text or chat), data, weights, config,
    tokenizer, folder.
    """

    def __init__(self, job: dict):
        self.job, self.folder = job, Path(job["folder"])
        door = importlib.import_module(job["door"])
        flags = {
            "device": "cpu",
            "val_ratio": 0.0,
            "out_dir": self.folder,
            "data_path": (Path(job["data"]),),
        }
        self.options = door.Options(**flags | job["flags"])
        self.runtime = Runtime.start(self.options.device, self.options.dtype, self.options.seed)
        self.tokenizer = load_tokenizer(job["tokenizer"])
        self.reads = self.targets = self.slots = 0
        self.reading_began = time.perf_counter()
        self.source = self.read(self.options.data_path[0])
        self.reading = time.perf_counter() - self.reading_began
        self.total = self.options.max_steps or self.source.steps_per_epoch * job["epochs"]
        self.bare = bare_mib()
        self.model = model_of(
            LMConfig(**job["config"]), read_tensors(job["weights"]), job["weights"]
        )
        if job["door"] == "train_lora":
            apply_lora(self.model, self.options.rank, self.options.alpha)

    def read(self, path: Path):
        """The file's steps. Each reading has a cache of its own, so that tokenising is always paid
        for.
        """
        self.reads += 1
        options = replace(
            self.options, data_path=(path,), out_dir=self.folder / f"read-{self.reads}"
        )
        data = read_data(DATASETS[self.job["rows"]], options, self.tokenizer, self.runtime)
        return batches_of(data.train, options, self.runtime)

    def counted_loss_sum(self, model, batch):
        self.targets += int((batch.labels[:, 1:] != -100).sum())
        self.slots += batch.labels.numel()
        return loss_sum(model, batch)

    def train(self, orders: Orders) -> None:
        # One more than there will be, or the loop would end with the last one, before the order is
        # answered.
        source = Paced(next(self.source.steps(0)), lambda: self.rounds(orders), self.total + 1)
        options = replace(self.options, epochs=1, max_steps=0)
        train_paced(
            self.model,
            source,
            options,
            self.runtime,
            self.counted_loss_sum,
            self.folder / "metrics.jsonl",
        )

    def rounds(self, orders: Orders) -> Iterator[list]:
        planned = self.planned()
        epoch, clock = 0, self.reading
        for order in orders:
            self.targets = self.slots = steps = 0
            began = time.perf_counter()
            if order["do"] == "save":
                self.save(Path(order["path"]))
            elif order["do"] == "train_for":
                while time.perf_counter() - began < order["seconds"] and (
                    step := next(planned, None)
                ):
                    yield step
                    steps += 1
            elif order["do"] == "steps":
                for _ in range(order["count"]):
                    yield next(planned)
                    steps += 1
            else:
                for step in self.read(Path(order["data"])).steps(epoch):
                    yield step
                    steps += 1
                epoch += 1
            spent = time.perf_counter() - began
            clock += spent if order["do"] != "save" else 0.0
            counts = {"targets": self.targets, "slots": self.slots, "steps": steps}
            rate = sgemm_gflops() if order.get("sgemm") else None
            memory = {"bare_mib": self.bare, "peak_mib": memory_mib(peak=True)}
            _, trained = count_parameters(self.model)
            orders.reply(
                seconds=spent, clock=clock, sgemm=rate, parameters=trained, **counts, **memory
            )

    def planned(self) -> Iterator[list]:
        """The steps that the learning rate is planned for."""
        every = (step for epoch in count() for step in self.source.steps(epoch))
        return islice(every, self.total)

    def save(self, path: Path) -> None:
        if self.job["door"] == "train_lora":
            save_lora(self.model, path)
        else:
            torch.save(self.model.state_dict(), path)


if __name__ == "__main__":
    orders = Orders()
    Side(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))).train(orders)
