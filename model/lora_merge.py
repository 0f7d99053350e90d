"""A LoRA written into the base's weights, for export or for fast decoding, and taken out again."""

from collections import Counter

import torch
from torch import nn

from core.errors import UserError
from model.lora_layers import dense_weight, is_quantized, write_weight
from model.lora_targets import adapted, check_receptive, merged
from model.model_lora import attach, remove_lora


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Write each update into its Linear's weight: computed in fp32, rounded to the weight's dtype
    once.

    Weights and LoRA are kept, for ``unmerge_lora``. Raises ``UserError``, before anything changes,
    when there is no LoRA, when one is merged already, for weights of 4 bits, for a weight that
    another module uses too, and where a merged weight would not be finite.
    """
    check_receptive(model)
    if any(is_quantized(linear) for _, linear in adapted(model)):
        raise UserError("a 4-bit weight has no room for an update; call dequantize(model) first")
    weights = {name: linear.lora.merged(dense_weight(linear)) for name, linear in adapted(model)}
    if not weights:
        raise UserError(
            "there is no LoRA on this model to merge; call apply_lora or attach_lora first"
        )
    users = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    for name, weight in weights.items():
        if users[id(model.get_submodule(name).weight)] > 1:
            raise UserError(
                f"{name} shares its weight with another module, so keep its LoRA attached: none is merged"
            )
        if not weight.isfinite().all():
            raise UserError(
                f"merging would put NaN or infinity into {name}; go back to an earlier skill file"
            )
    for name, lora in remove_lora(model).items():
        linear = model.get_submodule(name)
        linear.unmerged = linear.weight.clone(), lora  # a tuple is no child: state-dict keys stay
        write_weight(linear, weights[name])


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Put back the weights and the LoRA that ``merge_lora`` found, bit for bit. Raises
    ``UserError`` if none did.
    """
    found = dict(merged(model))
    if not found:
        raise UserError("no LoRA is merged into this model")
    for linear in found.values():
        linear.weight.copy_(linear.unmerged[0])
    attach(model, {name: linear.unmerged[1] for name, linear in found.items()})
    for linear in found.values():
        del linear.unmerged
