"""A start that the rows choose: A spans the directions in which their loss falls fastest."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model.lora.layer import LoRA, adapted

STD = 0.02  # of A's usual start, whose length the rows of A keep


def start_from_gradient(model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> None:
    """Set each A to the first right singular vectors of dL/dW; B stays 0 and the base as it is.

    ``losses``: each makes a forward pass and returns its loss; L is their sum, with no dropout.
    The rows of A are orthogonal and as long as N(0, 0.02) makes them (in the manner of LoRA-GA,
    Wang et al. 2024, which also starts B). Nothing is drawn: equal losses give equal bits.
    """
    found: dict[LoRA, Tensor] = {}

    def watch(lora: LoRA, args: tuple[Tensor], output: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)  # (N, inputs)

        def add(slope: Tensor) -> None:  # of the Linear's output, (..., outputs)
            gradient = slope.flatten(0, -2).float().T @ x.float()
            found[lora] = found.get(lora, 0) + gradient

        output.register_hook(add)

    was_training = model.training
    model.eval()
    hooks = [linear.lora.register_forward_hook(watch) for _, linear in adapted(model)]
    for loss in losses:
        loss().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    with torch.no_grad():
        for lora, gradient in found.items():
            V = torch.linalg.svd(gradient, full_matrices=False).Vh[: lora.rank]
            lora.A.weight[: len(V)] = STD * V.size(1) ** 0.5 * V
