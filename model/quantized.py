"""A frozen base in 4 bits (QLoRA, Dettmers et al. 2023), by the optional library bitsandbytes."""

import logging

import torch
from torch import nn

from core.errors import UserError
from model.lora.layer import adapted, dense_weight, exchange, is_quantized, lora_parameters
from model.lora.skill_file import base_fingerprint
from model.lora.targets import check_receptive, linears, output_head


def quantize(model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> None:
    """Replace Linears by ones of 4 bits (NF4 with double quantisation), in place.

    The output head, embeddings and norms stay as they are. So do Linears whose weight other code
    reads as numbers: those of a subclass (PyTorch's attention has such), and those that a Hugging
    Face model keeps in fp32 (T5's ``wo``). ``compute_dtype``: of the products, for which a weight
    is spread out again. Prints what a parameter costs now. Skills name the base as it was before.
    Raises ``UserError`` without bitsandbytes, for a model that carries a LoRA or has no Linear
    left, and as ``check_receptive`` does.
    """
    # It advises to install a package that would fetch compiled code from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise UserError("4 bits need bitsandbytes: pip install -r requirements-4bit.txt") from error
    check_receptive(model)
    if any(True for _ in adapted(model)):
        raise UserError("quantize before LoRA is applied; call remove_lora(model) first")
    kept, found = _kept(model), linears(model).values()
    chosen = [linear for linear in found if type(linear) is nn.Linear and linear not in kept]
    if not chosen:
        raise UserError("no Linear here can go into 4 bits; leave out load_in_4bit")
    model.known_as, places = base_fingerprint(model), _places(model)
    for linear in chosen:
        weight, bias = linear.weight, linear.bias
        settings = {"compute_dtype": compute_dtype, "quant_type": "nf4", "device": "meta"}
        small = Linear4bit(linear.in_features, linear.out_features, bias is not None, **settings)
        packed = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4", module=small)
        small.weight, small.bias = packed.to(weight.device), bias  # moving is what quantises
        # On some CPUs it would repack the weight at the first evaluation, and compute other
        # numbers from then on.
        small.support_avx512bf16_for_cpu = False
        setattr(*places[linear], small.train(linear.training))
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not hasattr(parameter, "quant_state"):
            # One tensor that still lies in the file it was read from keeps all of it in memory.
            parameter.data = parameter.data.clone()
    bits, all_bits = bits_per_parameter(model)
    cost = f"{bits:.3f} bits a parameter there, {all_bits:.3f} in the whole base"
    print(f"{len(chosen)} Linears in NF4: {cost}")


def dequantize(model: nn.Module) -> None:
    """Replace Linears of 4 bits by fp32 ones that compute the same; an applied LoRA stays."""
    loras, places = exchange(model, {}), _places(model)
    for small in filter(is_quantized, linears(model).values()):
        with torch.device("meta"):
            linear = nn.Linear(small.in_features, small.out_features, small.bias is not None)
        linear.weight = nn.Parameter(dense_weight(small), requires_grad=False)
        if small.bias is not None:  # bitsandbytes brings it to the type of the products
            linear.bias = nn.Parameter(small.bias.detach().float(), requires_grad=False)
        setattr(*places[small], linear.train(small.training))
    exchange(model, loras)
    if hasattr(model, "known_as"):
        del model.known_as


def bits_per_parameter(model: nn.Module) -> tuple[float, float]:
    """Bits a parameter: of the quantised weights with their statistics, and of the whole base."""
    added = {id(parameter) for parameter in lora_parameters(model)}
    small, others = {}, {}  # tensors by where they lie: some are shared
    small_count = other_count = 0
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            nested = state.state2
            tensors = (parameter.data, state.absmax, state.code, state.offset)
            for tensor in (*tensors, nested.absmax, nested.code):
                small[tensor.data_ptr()] = 8 * tensor.nbytes
            small_count += state.shape.numel()
        elif id(parameter) not in added:
            others[parameter.data_ptr()] = 8 * parameter.nbytes
            other_count += parameter.numel()
    small_bits, other_bits = sum(small.values()), sum(others.values())
    return small_bits / small_count, (small_bits + other_bits) / (small_count + other_count)


def _kept(model: nn.Module) -> set[nn.Module]:
    """The output head, and the modules that Hugging Face's classes in ``model`` want in fp32."""
    kept = {output_head(model)}
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            for word in getattr(module, attribute, None) or ():
                named = module.named_modules()
                kept |= {part for name, part in named if f".{word}." in f".{name}."}
    return kept


def _places(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, str]]:
    """Where each module hangs: its parent and its name there."""
    places = {}
    for parent in model.modules():
        places |= {child: (parent, name) for name, child in parent.named_children()}
    return places
