"""Where the arithmetic happens: device, dtype and seed."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from core.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device and the dtype of its matrix products; parameters and optimizer state are always fp32."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def start(cls, device: str = "auto", dtype: str = "auto", seed: int | None = None) -> "Runtime":
        """Resolve the flags and seed torch. Raises ``UserError`` for what this machine does not have."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("training runs in one process for now: start it with python, not with torchrun")
        runtime = cls(chosen := _device(device), _dtype(dtype, chosen))
        if seed is not None:
            torch.manual_seed(seed)
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
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.inputs.items()}
        return replace(batch, inputs=inputs, labels=batch.labels.to(self.device, non_blocking=True))

    def synchronize(self) -> None:
        """Wait for the device, so that a clock can be read."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def __str__(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"device {self.device}{threads}, dtype {str(self.dtype).removeprefix('torch.')}"


def _device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is not a device; use auto, cpu, cuda, cuda:N or mps") from error
    if not available.get(device.type, False):
        raise UserError(f"--device {name}: this machine or this torch build has no {device.type}; use --device auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtype float16 needs a GPU; on a CPU use float32")
    return DTYPES[name]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and the trainable ones, tied ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
