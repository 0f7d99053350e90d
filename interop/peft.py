"""Skills as adapter folders of PEFT, and back.

Written is what every reader takes: one rank for all targets, alpha equal to it, no patterns and no
initialisation that reads the base's weights. Each scale is folded into B, and a smaller rank is
padded with zeros.
"""

import copy
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from core.errors import UserError, reason_of
from core.options import require
from interop.check import logits_of
from interop.llama import LAYER, our_modules, rotary_heads, their_module, to_halves, to_pairs, twin
from interop.updates import Parts, check_updates_only, is_update, portable, shapes_of
from model.LMConfig import LMConfig
from model.lora.config import LoRAConfig
from model.lora.layer import exchange, features
from model.lora.skill_file import KEYS, Skill, SkillMeta
from model.lora.targets import linears
from model.model import MiniMindLM
from model.weights import check_tensors, read_tensors

SETTINGS = "adapter_config.json"
PREFIX = "base_model.model."
ENDS = dict(zip(KEYS, ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), strict=True))
# A tensor's name without the prefix; a state dict taken in training names the adapter, "default".
NAME = r"(.+)\.lora_(?:([AB])(?:\.default)?\.weight|magnitude_vector(?:\.default)?(?:\.weight)?)"
# Entries of adapter_config.json that a skill file cannot hold, and what each stands for.
REFUSED = {"modules_to_save": "whole modules", "trainable_token_indices": "new embeddings"}
REFUSED |= {"target_parameters": "updates of parameters", "layer_replication": "repeated layers"}
REFUSED |= {"lora_bias": "biases", "alora_invocation_tokens": "an activated LoRA"}
REFUSED |= {"use_qalora": "pooled inputs", "use_bdlora": "block-diagonal factors"}
REFUSED |= {"kasa_config": "singular values", "arrow_config": "a router"}
REFUSED |= {"monteclora_config": "sampled weights"}
# Initialisations after which the adapter fits only the weights that they changed.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def save_peft(skill: Skill, base: nn.Module, base_name: str | None, folder: Path) -> None:
    """Write an adapter into ``folder``, for ``base``: ours as ``save_llama`` writes it, or another.

    ``base_name`` is what the adapter calls it. Raises ``UserError`` for a skill with more tensors
    than a LoRA, and for one whose targets are only in part DoRA's.
    """
    tensors, meta = skill
    check_updates_only(tensors)
    dora = {f"{target}.lora.magnitude" in tensors for target in meta.targets}
    partly = "the skill is a DoRA on some of its targets only, which an adapter cannot say"
    require(len(dora) == 1, f"{partly}; merge it into the base instead")
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
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    settings |= {"base_model_name_or_path": base_name, "r": rank, "lora_alpha": rank}
    settings |= {"target_modules": short_names(targets, base, config)}
    settings |= {"fan_in_fan_out": is_transposed, "use_dora": dora == {True}}
    settings |= {"lora_dropout": 0.0, "bias": "none", "use_rslora": False}
    settings |= {"init_lora_weights": True, "modules_to_save": None, "inference_mode": True}
    weights = folder / "adapter_model.safetensors"
    save_file(found, weights, metadata={"format": "pt"})
    (folder / SETTINGS).write_bytes((json.dumps(settings, indent=2) + "\n").encode())
    weights.chmod((folder / SETTINGS).stat().st_mode)  # safetensors: 0600


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
    modules = our_modules(config) if config else [name for name, _ in base.named_modules()]
    meant = {name for name in modules if name.rpartition(".")[2] in endings}
    return endings if meant == set(targets) else sorted(targets)


def load_peft(folder: Path, base: nn.Module) -> tuple[dict[str, Parts], SkillMeta]:
    """The updates in an adapter folder by target, for ``base``: ours, or the model it was made for.

    The meta has their scales, and names no base and no tokenizer yet. Raises ``UserError`` for a
    folder that is damaged or no LoRA, for an adapter that holds what a skill cannot, and listing
    every update that does not fit its own settings or the base.
    """
    settings = read_settings(folder)
    options, has_dora = ranks_and_alphas(settings, folder), bool(settings.get("use_dora"))
    config = base.config if isinstance(base.config, LMConfig) else None
    names, found = our_modules(config) if config else {}, linears(base)
    updates, scaling, problems = {}, {}, []
    for module, parts in read_updates(folder).items():
        target = names.get(module, "") if config else module
        rank, scaling[target] = options.rank_and_scaling(module)
        (own, inputs), outputs = parts["A.weight"].shape, len(parts["B.weight"])
        if target not in found:
            problems.append(f"{module} is no Linear of the base")
        elif features(found[target]) != (outputs, inputs):
            problems.append(f"{module} is {features(found[target])}, not {(outputs, inputs)}")
        elif rank != own:
            problems.append(f"{module} has rank {own}, and {SETTINGS} says {rank}")
        elif ("magnitude" in parts) != has_dora:
            problems.append(f"{module} contradicts use_dora {has_dora}")
        elif heads := rotary_heads(target, config) if config else 0:
            parts = {k: t if k == "A.weight" else to_pairs(t, heads) for k, t in parts.items()}
        updates[target] = parts
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    wrong = f"{folder} does not fit: {'; '.join(problems[:5])}{more}"
    require(not problems, f"{wrong}; name the base that it was made for, or copy it again")
    return updates, SkillMeta(stage="lora", scaling=scaling)


def read_settings(folder: Path) -> Mapping:
    """An adapter's settings. Raises ``UserError`` unless a LoRA in a skill file can do the same."""
    path = folder / SETTINGS
    require(path.is_file(), f"{path} does not exist; name the folder of an adapter")
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no adapter's config ({reason_of(error)})") from error
    kind = settings.get("peft_type")
    require(kind == "LORA", f"{path}: peft_type {kind!r} is not LORA, and cannot be converted")
    wrong = [f"{words} ({entry})" for entry, words in REFUSED.items() if settings.get(entry)]
    if settings.get("bias") not in (None, "none"):
        wrong.append(f"biases (bias {settings['bias']})")
    way_out = "merge it with PEFT, or train it without"
    require(not wrong, f"{path}: a skill file cannot hold {', '.join(wrong)}; {way_out}")
    begun = str(settings.get("init_lora_weights")).lower()
    way_out = "save it with PEFT's path_initial_model_for_weight_conversion"
    if begun == "loftq":  # which that conversion does not know
        way_out = "merge it with PEFT"
    changed = f"{path}: its initialisation, {begun}, changed the base; {way_out}"
    require(not begun.startswith(CHANGES_BASE), changed)
    return settings


def foreign_name(folder: Path, base: Path) -> str | None:
    """What an adapter's settings call its base, unless that is the name of ``base`` or nothing."""
    named = read_settings(folder).get("base_model_name_or_path")
    own = {base.name, base.stem, base.resolve().name}
    return str(named) if named and Path(str(named)).name not in own else None


def ranks_and_alphas(settings: Mapping, folder: Path) -> LoRAConfig:
    """Ranks and scales by module. Raises ``UserError`` for settings that no LoRA can have."""
    path = folder / SETTINGS
    patterns = {entry: settings.get(entry) or {} for entry in ("rank_pattern", "alpha_pattern")}
    for entry, pattern in patterns.items():
        is_object = isinstance(pattern, dict)
        require(is_object, f"{path}: {entry} is {pattern!r}, not names with numbers; correct it")
        slow = [key for key in pattern if not is_quick(key)]
        require(not slow, f"{path}: {entry} has {slow[:1]}, which may never end; write it plainly")
    rank, alpha = settings.get("r", 8), settings.get("lora_alpha", 8)  # PEFT's defaults
    require(alpha is not None, f"{path}: lora_alpha is null; write the number of its training")
    try:
        return LoRAConfig(rank, alpha, **patterns, use_rslora=bool(settings.get("use_rslora")))
    except UserError as error:
        raise UserError(f"{path}: {error}; correct it") from error


def is_quick(expression: str) -> bool:
    """Whether a regular expression can be tried on a name in no time."""
    # A repeated group may take exponentially long, and every other repetition adds a power.
    few = len(re.findall("[*+?{]", expression)) <= 3 and expression.count("(") <= 3
    return few and not re.search(r"\)[*+{]", expression)


def read_updates(folder: Path) -> dict[str, Parts]:
    """The tensors of an adapter by module, named as in a skill file.

    Raises ``UserError`` for a damaged file, and for tensors that make no update of a Linear.
    """
    if (weights := folder / "adapter_model.safetensors").is_file():
        try:
            tensors = load_file(weights)
        except Exception as error:  # safetensors raises many kinds
            unreadable = f"{weights} cannot be read ({reason_of(error)})"
            raise UserError(f"{unreadable}; copy it again") from error
        check_tensors(tensors, weights)
    else:
        tensors = read_tensors(folder / "adapter_model.bin")
    require(bool(tensors), f"{folder} holds no tensors; copy it again")
    modules = defaultdict(dict)
    for name, tensor in tensors.items():
        found = re.fullmatch(NAME, name.removeprefix(PREFIX))
        require(found is not None, f"{folder} holds {name}, which is no update of a Linear")
        module, key = found[1], f"{found[2]}.weight" if found[2] else "magnitude"
        require(key not in modules[module], f"{folder} holds {name} under two names; save it again")
        modules[module][key] = tensor
    for module, parts in modules.items():
        wrong = f"{folder}: {module} has {shapes_of(parts)}, which make no update"
        require(is_update(parts), f"{wrong}; copy it again")
    return modules


@torch.no_grad()
def merged_raw(model: nn.Module, folder: Path) -> nn.Module:
    """``model``, of Hugging Face, with an adapter folder's updates in its weights.

    Only for checking: it goes by PEFT's formulas and by nothing that a skill file went through.
    """
    settings, modules = read_settings(folder), dict(model.named_modules())
    for module, parts in read_updates(folder).items():
        weight = modules[module].weight
        transposed = isinstance(modules[module], Conv1D)
        A, B = parts["A.weight"].float(), parts["B.weight"].float()
        update = B @ A * raw_scale(settings, module, len(A))
        total = (weight.T if transposed else weight) + update
        if "magnitude" in parts:
            total = total * (parts["magnitude"] / total.norm(dim=1))[:, None]
        weight.copy_(total.T if transposed else total)
    return model


def logits_with(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Tensor:
    """What Hugging Face's model of the base computes with an adapter folder in its weights."""
    if isinstance(model, MiniMindLM):
        return logits_of(merged_raw(twin(model, tokenizer), folder))
    alone = copy.deepcopy(model)
    exchange(alone, {})
    return logits_of(merged_raw(alone, folder))


def raw_scale(settings: Mapping, module: str, rank: int) -> float:
    """What PEFT multiplies this module's update by, found as PEFT does (``get_pattern_key``)."""
    alphas = (settings.get("alpha_pattern") or {}).items()
    found = [alpha for key, alpha in alphas if re.match(rf"(.*\.)?({key})$", module)]
    alpha = [*found, settings.get("lora_alpha", 8)][0]
    return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)
