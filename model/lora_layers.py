"""The update of one Linear: LoRA (Hu et al. 2021), and DoRA and PiSSA, which vary it."""

import math

import torch
import torch.nn.functional as F
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


class DoRA(LoRA):
    """``magnitude * V / ||V||`` of each output, with V = W + scaling * B A (Liu et al. 2024).

    ``magnitude`` (outputs,) starts as the norm of W's rows. As in the paper, no gradient flows
    through the norm.
    """

    def __init__(self, linear: Linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        self.magnitude = nn.Parameter(dense_weight(linear).float().norm(dim=1))

    @staticmethod
    def forward_of_linear(self: Linear, x: Tensor) -> Tensor:
        y, lora = type(self).forward(self, x), self.lora
        dtype = lora.A.weight.dtype
        weight = dense_weight(self).to(dtype)
        stretch = lora._stretch(weight)
        if lora.training and lora.dropout.p:
            x = lora.dropout(x.to(dtype))
            by_base = F.linear(x, weight)
            update = lora.B(lora.A(x) * lora.scaling)
        else:
            by_base = (y if self.bias is None else y - self.bias).to(dtype)
            update = lora(x)
        return y + ((stretch - 1) * by_base + stretch * update).to(y.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        return self._stretch(weight).to(weight)[:, None] * super().merged(weight)

    def exported(self) -> dict[str, Tensor]:
        return {**super().exported(), "magnitude": self.magnitude}

    def _stretch(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            norm = LoRA.merged(self, weight).norm(dim=1)
        return self.magnitude / norm


class PiSSA(LoRA):
    """LoRA whose A and B start as the largest singular values of W, of which the frozen part is
    relieved (Meng 2024).

    The base stays as it is: the start, ``A0`` and ``B0``, is subtracted from the update instead. A
    file gets both, as an ordinary LoRA of twice the rank, and so fits the base like any other.
    """

    def __init__(self, linear: Linear, rank: int, scaling: float = 1.0, dropout: float = 0.0):
        super().__init__(linear, rank, scaling, dropout)
        U, S, V = torch.linalg.svd(dense_weight(linear).float(), full_matrices=False)
        root = (S[:rank] / scaling).sqrt()
        with torch.no_grad():
            self.A.weight.copy_(root[:, None] * V[:rank])
            self.B.weight.copy_(U[:, :rank] * root)
        self.register_buffer("A0", self.A.weight.detach().clone(), persistent=False)
        self.register_buffer("B0", self.B.weight.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        started = F.linear(F.linear(x.to(self.A0.dtype), self.A0) * self.scaling, self.B0)
        return super().forward(x) - started

    def merged(self, weight: Tensor) -> Tensor:
        return super().merged(weight) - self.scaling * (self.B0.to(weight) @ self.A0.to(weight))

    def is_zero(self) -> bool:
        return torch.equal(self.A.weight, self.A0) and torch.equal(self.B.weight, self.B0)

    def exported(self) -> dict[str, Tensor]:
        return {
            "A.weight": torch.cat((self.A.weight, self.A0)),
            "B.weight": torch.cat((self.B.weight, -self.B0), dim=1),
        }


def lora_of(linear: Linear, tensors: dict[str, Tensor], scaling: float = 1.0) -> LoRA:
    """The adapter for ``linear`` whose parameters are ``tensors`` (see ``exported``) themselves,
    copied if not fp32.
    """
    with torch.device("meta"):  # nothing is drawn
        kind = DoRA if "magnitude" in tensors else LoRA
        lora = kind(linear, tensors["A.weight"].size(0), scaling, init="none")
    lora.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    return lora
