"""Where the arithmetic happens: device, dtype, seed, and the other processes of the run."""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.errors import UserError
from dataset.batches import Batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATIENCE = timedelta(days=1)  # ranks wait while the first one prepares data or validates


@dataclass(frozen=True)
class Runtime:
    """A device, the dtype of its matrix products, and this process' place among the ranks.

    Parameters and optimizer state are always fp32. Every rank has the same weights and its own
    share of each optimizer step's rows; rank 0 alone prints and writes.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, device: str = "auto", dtype: str = "auto", seed: int | None = None) -> "Runtime":
        """Find the device, join the other processes of torchrun, and seed torch.

        Rank r is seeded with ``seed`` + r, so that dropout differs; DDP gives all ranks rank 0's
        weights. Raises ``UserError`` for what this machine does not have.
        """
        rank, world_size, chosen = 0, 1, _device(device)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            rank, world_size, chosen = _join(chosen)
        if dtype == "auto":
            has_bf16 = chosen.type == "cuda" and multiplies_bf16(chosen)
            dtype = "bfloat16" if has_bf16 else "float32"
        if dtype == "float16" and chosen.type == "cpu":
            raise UserError("dtype float16 needs a GPU; on a CPU use float32")
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)  # code that waits for "the" GPU means this one
        runtime = cls(chosen, DTYPES[dtype], rank, world_size)
        if seed is not None:
            torch.manual_seed(seed + rank)
        return runtime

    def autocast(self) -> AbstractContextManager:
        """Inside, matrix products run in ``dtype``."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16, does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def move(self, batch: Batch) -> Batch:
        """A copy of ``batch`` whose tensors are on the device."""
        inputs = {name: x.to(self.device, non_blocking=True) for name, x in batch.inputs.items()}
        return replace(batch, inputs=inputs, labels=batch.labels.to(self.device, non_blocking=True))

    def synchronize(self) -> None:
        """Wait for the device, so that a clock can be read."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def replicate(self, model: nn.Module, has_idle: bool) -> nn.Module:
        """``model``, so wrapped that a backward pass averages gradients over the ranks.

        ``has_idle``: some trainable parameter takes no part in the loss, and DDP would wait for it.
        """
        if self.world_size == 1:
            return model
        settings = {"find_unused_parameters": has_idle, "gradient_as_bucket_view": True}
        return DistributedDataParallel(model, **settings)

    def local(self, replica: nn.Module) -> AbstractContextManager:
        """Inside, a pass through what ``replicate`` returned averages no gradients."""
        return replica.no_sync() if self.world_size > 1 else nullcontext()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in fp64. Every rank must call it; all get the same."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let rank 0 go through the block first, and the other ranks after it."""
        if self.rank > 0:
            self.sum(0)
        try:
            yield
        finally:
            if self.rank == 0:
                self.sum(0)

    def on_first(self, work: Callable[[], object]) -> bool:
        """Do ``work`` in rank 0 while the others wait: whether its result is true, in every rank.

        If it raises there, all ranks end.
        """
        error, result = None, False
        if self.rank == 0:
            try:
                result = bool(work())
            except BaseException as raised:
                error = raised
        failed, result = self.sum(error is not None, result)
        if failed:
            raise error or SystemExit(2)
        return result > 0

    def rng_states(self) -> list[dict[str, Tensor]]:
        """torch's random states by device type, uint8, of every rank. All ranks must call it."""
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            own["mps"] = torch.mps.get_rng_state()
        states = [own] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(states, own)
        return states

    def set_rng_state(self, states: dict[str, Tensor | None]) -> None:
        """Put this rank's ``rng_states`` back; None leaves a generator as it is."""
        for name, state in states.items():
            if state is not None and name == "cuda":
                torch.cuda.set_rng_state(state, self.device)
            elif state is not None:
                (torch.mps if name == "mps" else torch).set_rng_state(state)

    def environment(self) -> dict[str, str | int]:
        """What must be equal for two runs to be equal bit for bit."""
        facts = {"torch": torch.__version__, "device": self.device.type, "dtype": str(self.dtype)}
        return facts | {"processes": self.world_size, "threads": torch.get_num_threads()}

    def __str__(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        processes = f", {self.world_size} processes" if self.world_size > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"device {self.device}{threads}{processes}, dtype {dtype}"


def _device(name: str) -> torch.device:
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = gpus | {"cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is none; use auto, cpu, cuda, cuda:N or mps") from error
    if not available.get(device.type, False):
        missing = f"this machine or this torch build has no {device.type}"
        raise UserError(f"device {name}: {missing}; use auto")
    if device.type != "cuda" and device.index:
        raise UserError(f"device {name}: only CUDA devices are numbered; use {device.type}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: there are only {torch.cuda.device_count()} CUDA devices")
    return device


def _join(device: torch.device) -> tuple[int, int, torch.device]:
    """Meet the other processes; return this one's rank, their number, and this one's device."""
    set_by_torchrun = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    way_out = "start several processes with torchrun"
    if missing := [name for name in set_by_torchrun if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set but {missing[0]} is not: {way_out}")
    try:
        world_size, rank, local_rank = (int(os.environ[name]) for name in set_by_torchrun[:3])
    except ValueError as error:
        raise UserError(f"WORLD_SIZE, RANK or LOCAL_RANK: {error}; {way_out}") from error
    if device.type == "mps":
        raise UserError("device mps has one GPU for one process: start one process, or use cpu")
    if device.type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if device.index is not None or here > gpus:
            wrong = f"device {device}: {here} processes need a GPU each and there are {gpus}"
            raise UserError(f"{wrong}; use cuda or cpu, and start no more processes than GPUs")
        device = torch.device("cuda", local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)  # else gloo's threads may abort an early exit
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)
    return rank, world_size, device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products and need not emulate them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    return device.type != "cpu" or bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
