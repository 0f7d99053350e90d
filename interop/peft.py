"""Skills as adapter folders of PEFT, and back.

Written is what every reader takes: one rank for all targets, alpha equal to it, no patterns and no
start that reads the base's weights. Each scale is folded into B, and a smaller rank is filled up
with zeros.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from core.errors import UserError, reason_of
from core.options import require
from interop.llama import LAYER, rotary_heads, their_module, to_halves, to_pairs
from model.huggingface import write_folder
from model.LMConfig import LMConfig
from model.lora.config import LoRAConfig
from model.lora.skill_file import KEYS, Skill, SkillMeta
from model.weights import check_tensors, read_tensors

Parts = dict[str, Tensor]  # the tensors of one target, by their key in a skill file
PREFIX = "base_model.model."
ENDS = {"A.weight": "lora_A.weight", "B.weight": "lora_B.weight"}
ENDS["magnitude"] = "lora_magnitude_vector"
# Entries of adapter_config.json that a skill file cannot hold, and what each stands for.
REFUSED = {"modules_to_save": "whole modules", "trainable_token_indices": "new embeddings"}
REFUSED |= {"target_parameters": "updates of parameters", "layer_replication": "repeated layers"}
REFUSED |= {"lora_bias": "biases", "alora_invocation_tokens": "an activated LoRA"}
# Starts after which the adapter fits only weights that PEFT changes when it loads them.
STARTS = ("pissa", "olora", "corda", "loftq")


def save_peft(skill: Skill, base: nn.Module, base_name: str, folder: Path) -> None:
    """Write an adapter folder for ``base``: ours as ``save_llama`` wrote it, or any other.

    Raises ``UserError`` for a skill with more tensors than a LoRA, and if the disk refuses.
    """
    tensors, meta = skill
    extra = [name for name in tensors if name.startswith("_")]
    require(not extra, f"the skill holds {extra[:1]}, for which an adapter has no place")
    config = base.config if isinstance(base.config, LMConfig) else None
    rank, found, targets = max(meta.ranks.values()), {}, []
    for target in meta.targets:
        named = {key: tensors.get(f"{target}.lora.{key}") for key in KEYS}
        parts = {key: tensor for key, tensor in named.items() if tensor is not None}
        parts = portable(parts, meta.scaling[target], rank)
        module, parts = theirs(target, parts, config) if config else (target, parts)
        targets.append(module)
        found |= {f"{PREFIX}{module}.{ENDS[key]}": tensor for key, tensor in parts.items()}
    is_transposed = any(isinstance(module, Conv1D) for module in base.modules())
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": short_names(targets, base, config),
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "use_rslora": False,
        "use_dora": any("magnitude" in name for name in tensors),
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }

    def write(folder: Path) -> None:
        save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(settings, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")

    write_folder(folder, write)


def portable(parts: Parts, scaling: float, rank: int) -> Parts:
    """The same update with scale 1 and this rank, at least its own: zeros fill up A and B."""
    A, B = parts["A.weight"].float(), parts["B.weight"].float() * scaling
    missing = rank - A.size(0)
    A = torch.cat((A, A.new_zeros(missing, A.size(1))))
    return {**parts, "A.weight": A, "B.weight": torch.cat((B, B.new_zeros(B.size(0), missing)), 1)}


def theirs(target: str, parts: Parts, config: LMConfig) -> tuple[str, Parts]:
    """Name and tensors of our target in a Llama: what leaves a rotated Linear has another order."""
    known = ".".join(target.split(".")[2:]) in LAYER
    require(known, f"the skill updates {target}, which shares its weight; merge it instead")
    if heads := rotary_heads(target, config):
        parts = {k: t if k == "A.weight" else to_halves(t, heads) for k, t in parts.items()}
    return their_module(target), parts


def short_names(targets: list[str], base: nn.Module, config: LMConfig | None) -> list[str]:
    """The endings of these names if they name no other module, as people write them; else all."""
    endings = sorted({target.rpartition(".")[2] for target in targets})
    layers = {f"layers.{n}.{m}" for n in range(config.n_layers) for m in LAYER} if config else set()
    modules = set(map(their_module, layers)) or {name for name, _ in base.named_modules()}
    meant = {name for name in modules if name.rpartition(".")[2] in endings}
    return endings if meant == set(targets) else sorted(targets)


def load_peft(folder: Path, base: nn.Module) -> tuple[dict[str, Parts], SkillMeta]:
    """The updates in an adapter folder by target, for ``base``: ours, or the model it was made for.

    The meta has their scales, and names no base and no tokenizer yet. Raises ``UserError`` for a
    folder that is damaged or no LoRA, and for an adapter that holds what a skill cannot.
    """
    settings, tensors = read_adapter(folder)
    config = base.config if isinstance(base.config, LMConfig) else None
    updates, scaling = {}, {}
    for module, parts in by_module(tensors, folder).items():
        target, parts = ours(module, parts, config, folder) if config else (module, parts)
        scaling[target] = scale_of(settings, module, parts["A.weight"].size(0))
        updates[target] = parts
    return updates, SkillMeta(stage="lora", scaling=scaling)


def ours(module: str, parts: Parts, config: LMConfig, folder: Path) -> tuple[str, Parts]:
    """The inverse of ``theirs``. Raises ``UserError`` for a module that no MiniMindLM has."""
    targets = (f"layers.{n}.{name}" for n in range(config.n_layers) for name in LAYER)
    known = {their_module(target): target for target in targets}
    require(module in known, f"{folder} updates {module}, which the base does not have")
    target = known[module]
    if heads := rotary_heads(target, config):
        parts = {k: t if k == "A.weight" else to_pairs(t, heads) for k, t in parts.items()}
    return target, parts


def by_module(tensors: dict[str, Tensor], folder: Path) -> dict[str, Parts]:
    """The tensors of an adapter, named as in a skill file. ``UserError`` where one is missing."""
    modules = defaultdict(dict)
    for name, tensor in tensors.items():
        module, key = split_name(name, folder)
        modules[module][key] = tensor
    for module, parts in modules.items():
        complete = "A.weight" in parts and "B.weight" in parts
        require(complete, f"{folder}: {module} has only {', '.join(parts)}; copy it again")
    return modules


def scale_of(settings: Mapping, module: str, rank: int) -> float:
    """What PEFT multiplies the update of this module by; the rank is that of its tensors."""
    alphas, alpha = settings.get("alpha_pattern") or {}, settings.get("lora_alpha", 8)
    uses_root = bool(settings.get("use_rslora"))
    options = LoRAConfig(rank, alpha, alpha_pattern=alphas, use_rslora=uses_root)
    return options.rank_and_scaling(module)[1]


def split_name(name: str, folder: Path) -> tuple[str, str]:
    """Module and key of a tensor's name, perhaps with the adapter's name "default" in it."""
    plain = name.removeprefix(PREFIX).replace(".default.", ".").removesuffix(".default")
    for key, end in ENDS.items():
        if plain.endswith(f".{end}"):
            return plain.removesuffix(f".{end}"), key
    if plain.endswith("lora_magnitude_vector.weight"):
        return plain.removesuffix(".lora_magnitude_vector.weight"), "magnitude"
    raise UserError(f"{folder} holds {name}, which is no update of a Linear")


def read_adapter(folder: Path) -> tuple[Mapping, dict[str, Tensor]]:
    """Settings and tensors of an adapter folder, or ``UserError``: see ``load_peft``."""
    path = folder / "adapter_config.json"
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no adapter's config ({reason_of(error)})") from error
    kind = settings.get("peft_type")
    require(kind == "LORA", f"{path}: peft_type {kind!r} is not LORA, and cannot be converted")
    wrong = [f"{words} ({entry})" for entry, words in REFUSED.items() if settings.get(entry)]
    if settings.get("bias", "none") != "none":
        wrong.append(f"biases (bias {settings['bias']})")
    require(not wrong, f"{path}: a skill file cannot hold {', '.join(wrong)}; merge it with PEFT")
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(STARTS):
        way_out = "save it with PEFT's path_initial_model_for_weight_conversion"
        raise UserError(f"{path}: it starts as {start}, which changes the base; {way_out}")
    require(isinstance(settings.get("r"), int), f"{path} names no rank r")
    if (weights := folder / "adapter_model.safetensors").is_file():
        try:
            tensors = load_file(weights)
        except Exception as error:  # safetensors raises many kinds
            raise UserError(f"{weights} cannot be read ({reason_of(error)})") from error
        check_tensors(tensors, weights)
    else:
        tensors = read_tensors(folder / "adapter_model.bin")
    require(bool(tensors), f"{folder} holds no tensors")
    return settings, tensors


@torch.no_grad()
def merged_raw(model: nn.Module, folder: Path) -> nn.Module:
    """``model``, of Hugging Face, with an adapter folder's updates in its weights.

    Only for checking: it goes by PEFT's formulas and by nothing that a skill file went through.
    """
    settings, tensors = read_adapter(folder)
    weights = dict(model.named_modules())
    for module, parts in by_module(tensors, folder).items():
        weight = weights[module].weight
        transposed = isinstance(weights[module], Conv1D)
        A, B = parts["A.weight"].float(), parts["B.weight"].float()
        update = B @ A * scale_of(settings, module, A.size(0))
        total = (weight.T if transposed else weight) + update
        if "magnitude" in parts:
            total = total * (parts["magnitude"] / total.norm(dim=1))[:, None]
        weight.copy_(total.T if transposed else total)
    return model
