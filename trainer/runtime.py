"""Where the arithmetic happens: device, dtype, seed, and the other processes of the run."""

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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATIENCE = timedelta(
    days=1
)  # of processes that wait while the first one prepares data or validates


@dataclass(frozen=True)
class Runtime:
    """A device, the dtype of its matrix products, and which of ``world_size`` equal processes this
    one is.

    Parameters and optimizer state are always fp32. Every process has the same weights and an own
    share of each optimizer step's rows; ``rank`` 0 alone prints and writes.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, device: str = "auto", dtype: str = "auto", seed: int | None = None) -> "Runtime":
        """Resolve the flags, join the other processes that torchrun started, and seed torch.

        Rank r is seeded with ``seed`` + r, so that dropout differs; DDP gives all of them rank 0's
        weights. Raises ``UserError`` for what this machine does not have.
        """
        rank, world_size, chosen = 0, 1, _device(device)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            rank, world_size, chosen = _join(chosen, device)
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(
                chosen
            )  # what waits for "the" GPU, or allocates on it, means this one
        runtime = cls(chosen, _dtype(dtype, chosen), rank, world_size)
        if seed is not None:
            torch.manual_seed(seed + rank)
        return runtime

    def autocast(self) -> AbstractContextManager:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16, does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def move(self, batch):
        """A copy of a ``Batch`` whose tensors are on the device."""
        inputs = {
            name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.inputs.items()
        }
        return replace(batch, inputs=inputs, labels=batch.labels.to(self.device, non_blocking=True))

    def synchronize(self) -> None:
        """Wait for the device, so that a clock can be read."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def replicate(self, model: nn.Module, has_idle: bool) -> nn.Module:
        """``model`` so wrapped that a backward pass averages its gradients over all processes.

        ``has_idle``: some trainable parameter takes no part in the loss, which would otherwise make
        the others wait.
        """
        if self.world_size == 1:
            return model
        return DistributedDataParallel(
            model, find_unused_parameters=has_idle, gradient_as_bucket_view=True
        )

    def local(self, replica: nn.Module) -> AbstractContextManager:
        """Inside, forward and backward passes of what ``replicate`` returned keep their gradients
        to themselves.
        """
        return replica.no_sync() if self.world_size > 1 else nullcontext()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in fp64. They must all call it, and get the
        same.
        """
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """What happens inside happens in rank 0 first, and in the others when it is done there."""
        if self.rank > 0:
            self.sum(0)
        try:
            yield
        finally:
            if self.rank == 0:
                self.sum(0)

    def on_first(self, work: Callable[[], object]) -> None:
        """Do ``work`` in rank 0 while the others wait. If it raises there, they end too,
        silently.
        """
        error = None
        if self.rank == 0:
            try:
                work()
            except BaseException as raised:
                error = raised
        if self.sum(error is not None)[0]:
            raise error or SystemExit(2)

    def rng_state(self) -> dict[str, Tensor]:
        """torch's random states by device type, each a uint8 tensor."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            states["mps"] = torch.mps.get_rng_state()
        return states

    def rng_states(self) -> list[dict[str, Tensor]]:
        """``rng_state`` of every rank. They must all call it."""
        if self.world_size == 1:
            return [self.rng_state()]
        states = [{} for _ in range(self.world_size)]
        for name, state in self.rng_state().items():
            gathered = [torch.empty_like(state) for _ in states]
            dist.all_gather(gathered, state)
            for rank, other in enumerate(gathered):
                states[rank][name] = other
        return states

    def set_rng_state(self, states: dict[str, Tensor | None]) -> None:
        """Put ``rng_state`` back; None leaves a generator as it is."""
        for name, state in states.items():
            if state is not None and name == "cuda":
                torch.cuda.set_rng_state(state, self.device)
            elif state is not None:
                (torch.mps if name == "mps" else torch).set_rng_state(state)

    def environment(self) -> dict[str, str | int]:
        """What must be equal for two runs to be equal bit for bit."""
        facts = {"torch": torch.__version__, "device": self.device.type, "dtype": str(self.dtype)}
        return facts | {"processes": self.world_size, "threads": torch.get_num_threads()}

    def stop(self) -> None:
        """Leave the other processes."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def __str__(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        processes = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"device {self.device}{threads}{processes}, dtype {str(self.dtype).removeprefix('torch.')}"


def _join(device: torch.device, asked: str) -> tuple[int, int, torch.device]:
    """This process' rank, the number of processes, and this one's device, once all have met."""
    set_by_torchrun = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in set_by_torchrun if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is set but {missing[0]} is not: start several processes with torchrun"
        )
    try:
        world_size, rank, local_rank = (int(os.environ[name]) for name in set_by_torchrun[:3])
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE, RANK or LOCAL_RANK: {error}; start several processes with torchrun"
        ) from error
    if device.type == "mps":
        raise UserError(
            "--device mps has one GPU for one process: start it with python, or pass --device cpu"
        )
    if device.type == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if device.index is not None or here > torch.cuda.device_count():
            raise UserError(
                f"--device {asked}: {here} processes need a GPU each and there are {torch.cuda.device_count()}; pass"
                " --device cuda, or cpu, and let torchrun start no more processes than GPUs"
            )
        device = torch.device("cuda", local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE
        )
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    return rank, world_size, device


def _device(name: str) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"--device {name!r} is not a device; use auto, cpu, cuda, cuda:N or mps"
        ) from error
    if not available.get(device.type, False):
        raise UserError(
            f"--device {name}: this machine or this torch build has no {device.type}; use --device auto"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return (
            torch.bfloat16 if device.type == "cuda" and multiplies_bf16(device) else torch.float32
        )
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtype float16 needs a GPU; on a CPU use float32")
    return DTYPES[name]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products and need not emulate them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    return device.type != "cpu" or bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and the trainable ones, tied ones once. One of 4 bits counts as what it stands
    for.
    """
    parameters = list(model.parameters())
    counts = [
        p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in parameters
    ]
    return sum(counts), sum(p.numel() for p in parameters if p.requires_grad)
