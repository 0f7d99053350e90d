"""The update of one Linear: LoRA (Hu et al. 2021), and DoRA and PiSSA, which vary it."""

import math
from collections.abc import Iterator, Mapping
from types import MethodType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D  # Conv1D is GPT-2's Linear, with a transposed weight


def features(linear: Linear) -> tuple[int, int]:
    """(outputs, inputs). A quantised weight has another shape, so it is not asked."""
    return (
        (linear.nf, linear.nx)
        if isinstance(linear, Conv1D)
        else (linear.out_features, linear.in_features)
    )


def is_quantized(linear: Linear) -> bool:
    """Whether the weight is held in 4 bits, by bitsandbytes."""
    return getattr(linear.weight, "quant_state", None) is not None


def dense_weight(linear: Linear) -> Tensor:
    """The weight that the Linear multiplies by: (outputs, inputs), fp32 at least, without
    gradient.
    """
    weight = linear.weight.detach()
    if is_quantized(linear):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight, linear.weight.quant_state)
    weight = weight.T if isinstance(linear, Conv1D) else weight
    return weight if weight.dtype == torch.float64 else weight.float()


def write_weight(linear: Linear, weight: Tensor) -> None:
    """Copy ``weight`` (outputs, inputs) into the Linear's own, in place, rounded to its dtype."""
    with torch.no_grad():
        linear.weight.copy_(weight.T if isinstance(linear, Conv1D) else weight)


class LoRA(nn.Module):
    """The update ``scaling * B(A(dropout(x)))`` of ``linear``; its parameters are fp32.

    A ~ N(0, 0.02) and B = 0, so training starts from the base exactly; ``init`` "kaiming" and
    "gaussian" are PEFT's other ways to draw A, and "none" leaves both to the caller.
    """

    def __init__(
        self,
        linear: Linear,
        rank: int,
        scaling: float = 1.0,
        dropout: float = 0.0,
        init: str = "minimind",
    ):
        super().__init__()
        outputs, inputs = features(linear)
        self.scaling = scaling
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

    @property
    def rank(self) -> int:
        return self.A.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(self.dropout(x.to(self.A.weight.dtype))) * self.scaling)

    @staticmethod
    def forward_of_linear(self: Linear, x: Tensor) -> Tensor:
        """What replaces the ``forward`` of a Linear that carries this as ``lora``."""
        y = type(self).forward(self, x)  # the class's own: keeps quantised Linears working
        return y + self.lora(x).to(y.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """The weight (outputs, inputs), fp32 or fp64, that computes alone what ``weight`` and this
        compute together.
        """
        return weight + self.scaling * (self.B.weight.to(weight) @ self.A.weight.to(weight))

    def is_zero(self) -> bool:
        """Whether the update is none, as before training."""
        return not self.B.weight.any()

    def output_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter is not self.A.weight]

    def exported(self) -> dict[str, Tensor]:
        """The tensors of a skill file, by their key after ``.lora.``."""
        return {"A.weight": self.A.weight, "B.weight": self.B.weight}


def adapted(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The Linears that carry a LoRA, with their names."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module._modules.get("lora"), LoRA)
    )


def merged(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The Linears into which a LoRA is merged, with their names."""
    return ((name, module) for name, module in model.named_modules() if "unmerged" in vars(module))


def attach(model: nn.Module, adapters: Mapping[str, LoRA]) -> None:
    """Put each adapter on the Linear of that name, which carries none, on its device and in its
    mode.
    """
    for name, lora in adapters.items():
        linear = model.get_submodule(name)
        if (lora.A.weight.device, lora.training) != (
            linear.weight.device,
            linear.training,
        ):  # rare, and slow to ask
            lora.to(linear.weight.device).train(linear.training)
        linear.lora = lora
        # A bound method, no closure: deepcopy re-binds it, and `del` brings back the class's own.
        linear.forward = MethodType(lora.forward_of_linear, linear)


def remove_lora(model: nn.Module) -> dict[str, LoRA]:
    """Undo ``apply_lora`` and return what ``attach`` takes: the base is bit for bit as before, and
    stays frozen.
    """
    removed = {}
    for name, linear in list(adapted(model)):
        removed[name] = linear.lora
        del linear.forward, linear.lora
    return removed


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``apply_lora`` added."""
    return [parameter for _, linear in adapted(model) for parameter in linear.lora.parameters()]


def output_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of ``lora_parameters`` on the side of the outputs, B and magnitude, which LoRA+ trains
    faster.
    """
    return [
        parameter for _, linear in adapted(model) for parameter in linear.lora.output_parameters()
    ]
