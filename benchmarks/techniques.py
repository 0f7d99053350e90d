"""What each technique of the training step is worth: those in use, taken away, and those left out,
put in.

    python benchmarks/techniques.py --result benchmarks/results/techniques.json

Each variant has a process of its own, in which its steps and ours take turns: a noisy machine is
noisy for both.
"""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import run
from core.options import option, parse, require

GLIBC = {
    -3: 32 << 20,
    -1: 64 << 20,
}  # the mmap and trim thresholds that it comes to by itself, by mallopt's numbers
VARIANTS = {
    "autograd kernels": "in use, taken away: hand-written gradients of RMSNorm, SwiGLU and the head's loss",
    "real rotary pairs": "in use, taken away: rotary positions as one complex product",
    "repeated keys and values": "in use, taken away: grouped queries inside the attention kernel",
    "optimizer not fused": "in use, taken away: fused AdamW",
    "one large pass": "in use, taken away: the token budget of a pass",
    "fused projections": "left out: one product for wq, wk, wv and one for w1, w3",
    "attention by blocks": "left out: causal attention as plain products of 64 queries each",
    "allocator keeps memory": "left out: glibc told never to give memory back",
    "Muon": "in use for pretraining: learns more from a token, in a longer step",
    "Muon in float32": "the same where the processor has no bfloat16",
    "compiled": "the flag --compile",
    "bfloat16": "the flag --dtype bfloat16",
}

if sys.platform != "linux":
    del VARIANTS["allocator keeps memory"]


@dataclass
class Options:
    """Time an optimizer step of pretraining under each variant, beside ours."""

    variant: str = option(
        "",
        "run this one in this process and print the seconds of each step, ours first (used by the command itself)",
    )
    only: tuple[str, ...] = option(tuple(VARIANTS), "variants to compare with ours")
    steps: int = option(9, "timed steps of each side")
    rows: int = option(8, "windows of a step")
    max_seq_len: int = option(512, "tokens of a window")
    dim: int = option(512, "width of the model")
    n_layers: int = option(8, "number of blocks")
    result: Path | None = option(None, "also write the figures to this JSON file")

    def __post_init__(self):
        for name in ("steps", "rows"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)} must be at least 1")
        for variant in (*self.only, *([self.variant] if self.variant else [])):
            require(
                variant in VARIANTS, f"{variant!r} is no variant; there are {', '.join(VARIANTS)}"
            )


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    if options.variant:
        print(json.dumps(step_seconds(options)))
        return {}
    from benchmarks.result_file import measured_on, write_results
    from benchmarks.training.measure import ratios

    rows = {}
    for variant in options.only:
        ours, theirs = child(variant, options)
        figures = ratios(theirs, ours)
        rows[variant] = {"what": VARIANTS[variant], "time_against_ours": figures}
        print(
            f"{figures['median']:.3f}  ({figures['min']:.3f} .. {figures['max']:.3f})  {variant}: {VARIANTS[variant]}",
            flush=True,
        )
    shape = {
        name: getattr(options, name) for name in ("steps", "rows", "max_seq_len", "dim", "n_layers")
    }
    figures = {**shape, "variants": rows, **measured_on(("torch",))}
    write_results(options.result, figures)
    return figures


def child(variant: str, options: Options) -> list[list[float]]:
    """Seconds of each step of ours and of ``variant``, in a new process."""
    words = [sys.executable, __file__, "--variant", variant]
    for name in ("steps", "rows", "max_seq_len", "dim", "n_layers"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:  # the child has said why
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def step_seconds(options: Options) -> list[list[float]]:
    """Seconds of each step of ours and of the variant."""
    ours, theirs = Trained("", options), Trained(options.variant, options)
    for side in (ours, theirs):
        side.step()  # allocates or compiles
    return [
        list(column)
        for column in zip(
            *((ours.step(), theirs.step()) for _ in range(options.steps)), strict=True
        )
    ]


class Trained:
    """A model that trains under one variant, or under none: ours with AdamW."""

    def __init__(self, variant: str, options: Options):
        import torch

        from dataset.batches import MICRO_TOKENS, Batch
        from model.LMConfig import LMConfig
        from model.model import MiniMindLM
        from trainer.optimizer import MuonAdamW, param_groups

        torch.manual_seed(0)
        self.variant = variant
        self.model = MiniMindLM(LMConfig(dim=options.dim, n_layers=options.n_layers)).train()
        ids = torch.randint(3, self.model.config.vocab_size, (options.rows, options.max_seq_len))
        rows = (
            options.rows
            if variant == "one large pass"
            else max(1, MICRO_TOKENS // options.max_seq_len)
        )
        self.passes = [
            Batch({"input_ids": part}, part, part[:, 1:].numel(), 0, part.numel())
            for part in ids.split(rows)
        ]
        groups = param_groups(self.model, 0.1, "muon" if "Muon" in variant else "adamw")
        if variant == "optimizer not fused":
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], lr=1e-4, fused=False
            )
        else:
            self.optimizer = MuonAdamW(groups, 1e-4)
        if variant == "compiled":
            self.model.compile()

    def step(self) -> float:
        """Seconds of one optimizer step."""
        import torch

        from model.loss import loss_sum

        targets = sum(batch.n_targets for batch in self.passes)
        autocast = (
            torch.autocast("cpu", torch.bfloat16) if self.variant == "bfloat16" else nullcontext()
        )
        with changed(self.variant):
            began = time.perf_counter()
            for batch in self.passes:
                with autocast:
                    loss = loss_sum(self.model, batch) / targets
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return time.perf_counter() - began


def blocked_attention(q, k, v, is_causal: bool, **settings):
    """Causal attention of (B, heads, T, head_dim) by large matrix products, which run faster than
    those of the kernel.

    The queries of one key head are one matrix; each block of queries meets the keys up to its own
    end.
    """
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            groups, length, width = q.size(1), q.size(2), q.size(3)
            out, norms = torch.empty_like(q), []
            for start, end in blocks(length):
                scores = masked(q[:, :, start:end], k[:, :end])
                most = scores.amax(-1, keepdim=True)
                total = scores.sub_(most).exp_().sum(-1, keepdim=True)
                out[:, :, start:end] = (
                    torch.bmm(scores, v[:, :end]).div_(total).view(-1, groups, end - start, width)
                )
                norms.append(most.add_(total.log_()))
            ctx.save_for_backward(q, k, v, out, *norms)
            return out

        @staticmethod
        def backward(ctx, grad):
            q, k, v, out, *norms = ctx.saved_tensors
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            mean = (grad * out).sum(-1, keepdim=True)
            for (start, end), norm in zip(blocks(q.size(2)), norms, strict=True):
                part = q[:, :, start:end]
                rows, slope = (x[:, :, start:end].flatten(1, 2) for x in (q, grad))
                weights = masked(part, k[:, :end]).sub_(norm).exp_()
                change = (
                    torch.bmm(slope, v[:, :end].mT)
                    .sub_(mean[:, :, start:end].flatten(1, 2))
                    .mul_(weights)
                )
                grad_v[:, :end] += torch.bmm(weights.mT, slope)
                grad_k[:, :end] += torch.bmm(change.mT, rows)
                grad_q[:, :, start:end] = torch.bmm(change, k[:, :end]).view_as(part)
            return grad_q, grad_k, grad_v

    def blocks(length: int) -> list[tuple[int, int]]:
        return [(start, min(start + 64, length)) for start in range(0, length, 64)]

    def masked(q, k):
        scores = torch.bmm(q.flatten(1, 2), k.mT)
        future = torch.full((q.size(2), q.size(2)), -torch.inf, dtype=q.dtype).triu(1)
        scores[:, :, -q.size(2) :] += future.repeat(q.size(1), 1)
        return scores

    batch, heads, length, width = q.shape
    per_key = (batch * k.size(1), heads // k.size(1), length, width)
    keys = (x.reshape(-1, length, width) for x in (k, v))
    return Attention.apply((q * width**-0.5).reshape(per_key), *keys).view(q.shape)


@contextmanager
def changed(variant: str) -> Iterator[None]:
    """The model with another arithmetic for the same result."""
    import torch
    import torch.nn.functional as F

    from model.model import Attention, swiglu

    def plain_norm(x, weight, eps):
        return weight * F.rms_norm(x.float(), (x.size(-1),), eps=eps).type_as(x)

    def plain_loss(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")

    def real_rotate(x, turns):
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turns.real[:, None, :], turns.imag[:, None, :]
        turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
        return turned.flatten(-2).type_as(x)

    sdpa, plain_attention = F.scaled_dot_product_attention, Attention.forward

    def repeated(q, k, v, enable_gqa, **settings):
        groups = q.size(1) // k.size(1)
        return sdpa(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), **settings)

    def fused_feed_forward(self, x):
        gate, up = F.linear(x, torch.cat((self.w1.weight, self.w3.weight))).chunk(2, -1)
        return self.w2(swiglu(gate, up))

    def fused_attention(self, x, *rest):
        linears = (self.wq, self.wk, self.wv)
        product = F.linear(x, torch.cat([linear.weight for linear in linears]))
        parts = product.split([linear.out_features for linear in linears], -1)
        with ExitStack() as stack:
            for linear, part in zip(linears, parts, strict=True):
                stack.enter_context(patch.object(linear, "forward", lambda _, part=part: part))
            return plain_attention(self, x, *rest)

    replaced = {
        "autograd kernels": {
            "rms_norm": plain_norm,
            "swiglu": lambda gate, up: F.silu(gate) * up,
            "linear_cross_entropy": plain_loss,
        },
        "real rotary pairs": {"rotate": real_rotate},
        "repeated keys and values": {"F.scaled_dot_product_attention": repeated},
        "attention by blocks": {"F.scaled_dot_product_attention": blocked_attention},
        "fused projections": {
            "FeedForward.forward": fused_feed_forward,
            "Attention.forward": fused_attention,
        },
    }
    with ExitStack() as stack:
        if variant == "allocator keeps memory":
            allocator = ctypes.CDLL(None)
            for parameter, usual in GLIBC.items():
                allocator.mallopt(parameter, 2**31 - 1)
                stack.callback(allocator.mallopt, parameter, usual)
        if variant == "Muon in float32":
            stack.enter_context(patch("trainer.optimizer.multiplies_bf16", lambda device: False))
        for name, replacement in replaced.get(variant, {}).items():
            stack.enter_context(patch(f"model.model.{name}", replacement))
        yield


if __name__ == "__main__":
    run(main)
