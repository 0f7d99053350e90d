"""A frozen base in 4 bits (QLoRA, Dettmers et al. 2023): NF4 with double quantisation, by
bitsandbytes, an extra.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from core.errors import UserError
from model.lora.layer import adapted, attach, dense_weight, is_quantized, lora_parameters
from model.lora.skill_file import base_fingerprint
from model.lora.targets import check_receptive, linears, output_head
from model.model_lora import remove_lora


def quantize(model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> None:
    """Replace every Linear but the output head by one of 4 bits, in place; embeddings and norms
    stay as they are.

    So do Linears whose weight something else reads as numbers: those of a class of its own
    (PyTorch's attention has such), and those that a Hugging Face model keeps in fp32 (T5's ``wo``).

    ``compute_dtype``: of the products, for which a weight is spread out again. Prints what a
    parameter costs now. Skills name the base as it was before. Raises ``UserError`` without
    bitsandbytes, for a model that carries a LoRA or has no Linear left, and as ``check_receptive``
    does.
    """
    # It advises to install a package that would fetch compiled code from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise UserError("4 bits need bitsandbytes: pip install -r requirements-4bit.txt") from error
    check_receptive(model)
    if any(True for _ in adapted(model)):
        raise UserError(
            "quantize the base first and apply LoRA then; call remove_lora(model) first"
        )
    kept = {id(output_head(model)), *_kept(model)}
    chosen = [
        (name, linear)
        for name, linear in linears(model)
        if type(linear) is nn.Linear and id(linear) not in kept
    ]
    if not chosen:
        raise UserError(
            "no Linear here can go into 4 bits (GPT-2's Conv1D cannot); leave out --load_in_4bit"
        )
    model.known_as = base_fingerprint(model)
    for name, linear in chosen:
        settings = {"compute_dtype": compute_dtype, "quant_type": "nf4", "device": "meta"}
        small = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, **settings
        )
        weight = Params4bit(
            linear.weight.detach(), requires_grad=False, quant_type="nf4", module=small
        )
        small.weight, small.bias = (
            weight.to(linear.weight.device),
            linear.bias,
        )  # moving is what quantises
        # On some CPUs it would repack the weight at the first evaluation: other numbers from then
        # on, in training too.
        small.support_avx512bf16_for_cpu = False
        _replace(model, name, small.train(linear.training))
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not hasattr(parameter, "quant_state"):
            # One tensor that still lies in the file it was read from keeps all of the file in
            # memory.
            parameter.data = parameter.data.clone()
    linear_bits, all_bits = bits_per_parameter(model)
    print(
        f"{len(chosen)} Linears in NF4: {linear_bits:.3f} bits a parameter there, {all_bits:.3f} in the whole base"
    )


def dequantize(model: nn.Module) -> None:
    """Replace every Linear of 4 bits by an ordinary one, fp32, that computes the same; an applied
    LoRA stays.
    """
    found = [(name, linear) for name, linear in linears(model) if is_quantized(linear)]
    loras = remove_lora(model)
    for name, small in found:
        with torch.device("meta"):
            linear = nn.Linear(small.in_features, small.out_features, small.bias is not None)
        linear.weight = nn.Parameter(dense_weight(small), requires_grad=False)
        if small.bias is not None:  # bitsandbytes brings it to the type of the products
            linear.bias = nn.Parameter(small.bias.detach().float(), requires_grad=False)
        _replace(model, name, linear.train(small.training))
    attach(model, loras)
    if hasattr(model, "known_as"):
        del model.known_as


def bits_per_parameter(model: nn.Module) -> tuple[float, float]:
    """Of the quantised weights, with all their statistics, and of all parameters of the base."""
    added = {id(parameter) for parameter in lora_parameters(model)}
    small, others = {}, {}  # tensors by where they lie: some are shared
    small_count = other_count = 0
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            statistics = (
                state.absmax,
                state.code,
                state.offset,
                state.state2.absmax,
                state.state2.code,
            )
            small |= {tensor.data_ptr(): tensor for tensor in (parameter.data, *statistics)}
            small_count += state.shape.numel()
        elif id(parameter) not in added:
            others[parameter.data_ptr()] = parameter
            other_count += parameter.numel()

    def bits(tensors: dict[int, Tensor]) -> int:
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors.values())

    return bits(small) / small_count, (bits(small) + bits(others)) / (small_count + other_count)


def _kept(model: nn.Module) -> Iterator[int]:
    """The ids of the modules that Hugging Face's classes within ``model`` want in fp32."""
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            for word in getattr(module, attribute, None) or ():
                yield from (
                    id(part) for name, part in module.named_modules() if f".{word}." in f".{name}."
                )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
