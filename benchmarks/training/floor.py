"""How far an optimizer step is from the matrix products it cannot do without, all timed in one
process.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.training.child import seconds, sgemm_gflops
from benchmarks.training.data import document_files, documents
from benchmarks.training.measure import (
    Paced,
    linear_shapes,
    ratios,
    spread,
    train_paced,
    training_mflop,
)

ROWS = 16  # of an optimizer step


class Floor:
    """The linear products and the attention of one optimizer step, forward and backward, and
    nothing else.
    """

    def __init__(self, config, shapes: list[tuple[int, int]]):
        """``shapes``: rows and length of each micro-batch."""
        self.shapes, self.layers = shapes, config.n_layers
        self.weights = [
            torch.randn(outputs, inputs).requires_grad_()
            for inputs, outputs in linear_shapes(config)
        ]
        rows, length = max(shapes, key=lambda shape: shape[0] * shape[1])
        widths = {size for shape in linear_shapes(config) for size in shape}
        self.rows_of = {width: torch.randn(rows * length, width) for width in widths}
        head_dim = config.dim // config.n_heads
        heads = (
            config.n_heads,
            config.n_kv_heads,
            config.n_kv_heads,
            config.n_heads,
        )  # query, key, value, gradient
        self.attention = [torch.randn(rows, length, n, head_dim) for n in heads]

    def linears(self) -> None:
        for rows, length in self.shapes:
            for weight in self.weights:
                x = self.rows_of[weight.size(1)][: rows * length].requires_grad_()
                y = F.linear(x, weight)
                torch.autograd.grad(y, (x, weight), self.rows_of[weight.size(0)][: rows * length])

    def sdpa(self) -> None:
        for rows, length in self.shapes:
            q, k, v, gradient = (x[:rows, :length].transpose(1, 2) for x in self.attention)
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            for _ in range(self.layers):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                torch.autograd.grad(y, (q, k, v), gradient)


def floor(options, folder: Path) -> dict:
    """Our whole optimizer step on full windows against its matrix products alone, and both against
    sgemm.

    With either optimizer: Muon's own products are no part of the floor.
    """
    return {name: _floor(options, folder / name, name) for name in ("adamw", "muon")}


def _floor(options, folder: Path, optimizer: str) -> dict:
    import train_pretrain
    from dataset.batches import PretrainDataset
    from dataset.tokenizer import load_tokenizer
    from model.LMConfig import LMConfig
    from model.loss import loss_sum
    from model.model import MiniMindLM
    from trainer.runtime import Runtime
    from trainer.stage import batches_of, read_data

    settings = {
        "max_seq_len": options.max_seq_len,
        "dim": options.dim,
        "n_layers": options.n_layers,
        "val_ratio": 0.0,
    }
    settings |= {"batch_size": ROWS, "optimizer": optimizer}
    door = train_pretrain.Options(out_dir=folder, device="cpu", **settings)
    folder.mkdir()
    runtime = Runtime.start(door.device, door.dtype, door.seed)
    tokenizer = load_tokenizer(door.tokenizer_path)
    file = document_files(
        documents(options.pretrain), "full", tokenizer, door.max_seq_len, 1, 2 * ROWS, folder
    )[0]
    door.data_path = (file.path,)
    config = LMConfig(vocab_size=len(tokenizer), dim=door.dim, n_layers=door.n_layers)
    model = MiniMindLM(config)
    source = batches_of(read_data(PretrainDataset, door, tokenizer, runtime).train, door, runtime)
    full = ROWS * door.max_seq_len

    def full_steps() -> Iterator[list]:
        epoch = 0
        while True:
            yield from (
                step for step in source.steps(epoch) if sum(b.n_tokens for b in step) == full
            )
            epoch += 1

    steps = full_steps()
    warm_up = next(steps)
    products = Floor(config, [tuple(batch.labels.shape) for batch in warm_up])
    times: dict[str, list[float]] = {"step": [], "linears": [], "sdpa": []}
    rates = []

    def rounds() -> Iterator[list]:
        for _ in range(1 + options.rounds):  # the first one allocates and does not count
            began = time.perf_counter()
            yield next(steps)
            times["step"].append(time.perf_counter() - began)
            times["linears"].append(seconds(products.linears))
            times["sdpa"].append(seconds(products.sdpa))
            rates.append(sgemm_gflops())

    train_paced(model, Paced(warm_up, rounds), door, runtime, loss_sum, folder / "metrics.jsonl")
    rates, times = rates[1:], {name: values[1:] for name, values in times.items()}
    mflop, sgemm = training_mflop(config, door.max_seq_len), max(rates)
    both = [a + b for a, b in zip(times["linears"], times["sdpa"], strict=True)]
    at_sgemm = full * mflop / 1e3 / sgemm
    return {
        "rounds": options.rounds,
        "tokens_per_step": full,
        "micro_batches": products.shapes,
        "mflop_per_token": round(mflop, 2),
        "sgemm_gflops": spread(rates, 1),
        "seconds": {name: spread(values) for name, values in times.items()},
        "tokens_per_second": spread((full / t for t in times["step"]), 1),
        "products_of_step": ratios(both, times["step"]),
        "sgemm_of_products": spread(at_sgemm / t for t in both),
        "sgemm_of_step": spread(at_sgemm / t for t in times["step"]),
    }
