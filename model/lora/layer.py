"""LoRA (Hu et al. 2021) of one Linear: what it computes, and how a Linear gets and loses it."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from core.errors import UserError

Linear = nn.Linear | Conv1D  # Conv1D is GPT-2's Linear, with a transposed weight
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # parts of names


def forward_with_lora(linear: Linear, x: Tensor) -> Tensor:
    """What replaces the ``forward`` of a Linear that carries a ``LoRA`` as its ``lora``."""
    y = type(linear).forward(linear, x)  # the class's own: keeps quantised Linears working
    return y + linear.lora(x).to(y.dtype) if linear.lora.is_on else y


class LoRA(nn.Module):
    """The update ``scaling * B(A(dropout(x)))`` of ``linear``; its parameters are fp32.

    A ~ N(0, 0.02) and B = 0, so training starts from the base exactly; "kaiming" and "gaussian" are
    PEFT's ways to draw A, and ``init`` "none" leaves both to the caller.
    """

    patched_forward = staticmethod(forward_with_lora)  # DoRA has another
    is_on = True  # see ``without_lora``

    def __init__(self, linear: Linear, rank: int, scaling=1.0, dropout=0.0, init="minimind"):
        super().__init__()
        outputs, inputs = features(linear)
        self.rank, self.scaling = rank, scaling
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Linear(inputs, rank, bias=False)
        self.B = nn.Linear(rank, outputs, bias=False)
        if init == "none":
            return
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.A.weight, std=1 / rank if init == "gaussian" else 0.02)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(self.dropout(x.to(self.A.weight.dtype))) * self.scaling)

    def merged(self, weight: Tensor) -> Tensor:
        """``weight`` (outputs, inputs), fp32 or fp64, with the update added to it."""
        return weight + self.scaling * (self.B.weight.to(weight) @ self.A.weight.to(weight))

    def is_zero(self) -> bool:
        """Whether the update changes nothing, as before training."""
        return not self.B.weight.any()

    def exported(self) -> dict[str, Tensor]:
        """The tensors of a skill file, by their key after ``.lora.``."""
        return dict(self.named_parameters())


def attach(linear: Linear, lora: LoRA) -> None:
    """Put ``lora`` on a ``linear`` that carries none, on its device and in its mode."""
    wanted = linear.weight.device, linear.training
    if (lora.A.weight.device, lora.training) != wanted:  # moving is slow, and rarely needed
        lora.to(linear.weight.device).train(linear.training)
    linear.lora = lora
    # A bound method, no closure: deepcopy re-binds it, and `del` brings back the class's own.
    linear.forward = MethodType(lora.patched_forward, linear)


def detach(linear: Linear) -> LoRA:
    """Undo ``attach`` and return the LoRA: ``linear`` is bit for bit as before."""
    lora = linear.lora
    del linear.forward, linear.lora
    return lora


def exchange(model: nn.Module, loras: Mapping[str, LoRA]) -> dict[str, LoRA]:
    """Replace every LoRA on ``model`` by ``loras``, and return what it carried, both by name."""
    taken = {name: detach(linear) for name, linear in list(adapted(model))}
    modules = {base_name(name): module for name, module in model.named_modules()} if loras else {}
    for name, lora in loras.items():
        attach(modules[name], lora)
    return taken


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` computes what its base does, bit for bit.

    A frozen model is its own base. Raises ``UserError`` for one that trains without a LoRA.
    """
    loras = [linear.lora for _, linear in adapted(model)]
    if not loras and any(p.requires_grad for p in model.parameters()):
        raise UserError("there is no LoRA on this model, so it cannot be told from its base")
    before = [lora.is_on for lora in loras]
    for lora in loras:
        lora.is_on = False
    try:
        yield
    finally:
        for lora, was_on in zip(loras, before, strict=True):
            lora.is_on = was_on


def adapted(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The Linears that carry a LoRA, with their names in the base."""
    for name, module in model.named_modules():
        if isinstance(module._modules.get("lora"), LoRA):
            yield base_name(name), module


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``apply_lora`` added."""
    return [parameter for _, linear in adapted(model) for parameter in linear.lora.parameters()]


def output_parameters(model: nn.Module) -> list[nn.Parameter]:
    """``lora_parameters`` on the side of the outputs (B, magnitude), which LoRA+ trains faster."""
    loras = [linear.lora for _, linear in adapted(model)]
    return [p for lora in loras for p in lora.parameters() if p is not lora.A.weight]


def base_name(name: str) -> str:
    """A name without what ``torch.compile`` and checkpoint wrappers add: skills fit either way."""
    for wrapper in WRAPPERS:
        if wrapper in name:
            name = ".".join(part for part in name.split(".") if part != wrapper)
    return name


def features(linear: Linear) -> tuple[int, int]:
    """(outputs, inputs). A quantised weight has another shape, so it is not asked."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def is_quantized(linear: Linear) -> bool:
    """Whether bitsandbytes holds the weight in 4 bits."""
    return getattr(linear.weight, "quant_state", None) is not None


def dense_weight(linear: Linear) -> Tensor:
    """The weight (outputs, inputs) that the Linear multiplies by: detached, fp32 or else fp64."""
    weight = linear.weight.detach()
    if is_quantized(linear):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight, linear.weight.quant_state)
    weight = weight.T if isinstance(linear, Conv1D) else weight
    return weight if weight.dtype == torch.float64 else weight.float()
