"""Files of MiniMind: those of April 2025 have our names, later ones have a Llama's.

Both are plain state dicts, perhaps in half precision, without a config: shapes tell its sizes.
"""

import copy
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.options import require
from interop.check import logits_of
from interop.llama import from_llama, our_modules, rotary_heads, to_pairs, twin
from interop.updates import Parts, is_update, portable, shapes_of
from model.LMConfig import LMConfig
from model.lora.layer import features
from model.lora.skill_file import KEYS, Skill, SkillMeta
from model.lora.targets import linears
from model.model import MiniMindLM
from model.weights import assembled, config_from_shapes, read_tensors

RANK = 16  # of its apply_lora, which takes no other without a change of its code
WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel and torch.compile add these parts
# Buffers that both compute.
COMPUTED = ("pos_cis", "model.freqs_cos", "model.freqs_sin")
# Parts of names that a MiniMindLM has no place for, and what they stand for.
REFUSED = {"q_norm": "norms of queries", "k_norm": "norms of keys"}
REFUSED |= {"experts": "a mixture of experts", "shared_experts": "a mixture of experts"}


def load_minimind(path: Path) -> MiniMindLM:
    """The fp32 model of a base file of any version, in eval mode.

    What no shape tells is as in LMConfig, and printed. Raises ``UserError`` for a file that is
    damaged or of another model, naming what a MiniMindLM lacks.
    """
    tensors = read_minimind(path)
    theirs = any(name.startswith("model.") for name in tensors)
    if not theirs:
        return assembled(LMConfig(**config_from_shapes(tensors, path)), tensors, path)
    numbers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    names = our_modules(LMConfig(n_layers=max(len(numbers), 1)))
    modules = {name: name.removesuffix(".weight") for name in tensors}
    renamed = {f"{names.get(m, m)}.weight": tensors[name] for name, m in modules.items()}
    config = LMConfig(**config_from_shapes(renamed, path))
    return assembled(config, from_llama(tensors, config), path)


def read_minimind(path: Path) -> dict[str, Tensor]:
    """A file's tensors under bare names, without buffers. Raises ``UserError``."""
    require(not path.is_dir(), f"{path} is a folder; name a .pth file of MiniMind")
    found = {}
    for name, tensor in read_tensors(path).items():
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        wrong = [words for part, words in REFUSED.items() if part in parts]
        require(not wrong, f"{path} holds {wrong[:1]} ({name}), which a MiniMindLM has not")
        bare = ".".join(parts)
        require(bare not in found, f"{path} holds {bare} under two names; save it again")
        found[bare] = tensor
    return {n: t for n, t in found.items() if n not in COMPUTED and not n.endswith(".mask")}


def save_minimind(model: MiniMindLM, path: Path, dtype: torch.dtype) -> None:
    """Write a base as MiniMind's code of April 2025 loads it. Raises ``UserError`` with a LoRA."""
    tensors = {name: tensor.detach().cpu().to(dtype) for name, tensor in model.state_dict().items()}
    torch.save(tensors, path)


def differing(config: LMConfig) -> str:
    """The arguments of MiniMind's ``LMConfig`` that this model needs beside its defaults."""
    usual = LMConfig()
    names = "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta"
    found = [f"{n}={getattr(config, n)}" for n in names if getattr(config, n) != getattr(usual, n)]
    if config.hidden_dim != LMConfig(dim=config.dim).hidden_dim:
        found.append(f"hidden_dim={config.hidden_dim}")
    return ", ".join(found)


def load_skill(path: Path, base: MiniMindLM) -> tuple[dict[str, Parts], SkillMeta]:
    """The updates in a LoRA file of any version, by target; all have scale 1.

    Raises ``UserError`` for a file that is damaged or no LoRA, and listing what does not fit.
    """
    names, own, modules = our_modules(base.config), linears(base), defaultdict(dict)
    for name, tensor in read_minimind(path).items():
        module, _, key = name.rpartition(".lora.")
        require(key in KEYS[:2], f"{path} holds {name}, which is no part of a LoRA")
        target = names.get(module, module)
        require(target in own, f"{path}: {module} is no Linear of the base; name its own base")
        # Later versions rotate halves, as a Llama does.
        heads = rotary_heads(target, base.config) if module in names and key == KEYS[1] else 0
        fits = heads and len(tensor) == own[target].out_features
        modules[target][key] = to_pairs(tensor, heads) if fits else tensor
    for target, parts in modules.items():
        sizes = features(own[target])
        fits = is_update(parts) and sizes == (len(parts["B.weight"]), parts["A.weight"].size(1))
        wrong = f"{path}: {target} has {shapes_of(parts)}, which do not fit"
        require(fits, f"{wrong}; name its own base")
    require(bool(modules), f"{path} holds no LoRA")
    return modules, SkillMeta(stage="lora", scaling=dict.fromkeys(modules, 1.0))


def save_skill(skill: Skill, base: MiniMindLM, path: Path) -> int:
    """Write a LoRA as MiniMind's code of April 2025 loads it; returns its rank.

    Scales are folded into B; zeros fill smaller ranks, up to ``RANK``, and the square Linears that
    have no update, for its loader wants all. Raises ``UserError`` for what it cannot compute.
    """
    tensors, meta = skill
    square = {n: m for n, m in linears(base).items() if m.in_features == m.out_features}
    more = sorted(set(meta.targets) - square.keys())
    way_out = "merge it into the base instead"
    patched = "but MiniMind updates square Linears only"
    require(not more, f"the skill updates {more[:1]}, {patched}; {way_out}")
    dora = [name for name in tensors if name.endswith(".magnitude")]
    require(not dora, f"the skill is a DoRA, which MiniMind does not know; {way_out}")
    rank, found = max(RANK, *meta.ranks.values()), {}
    for target, linear in square.items():
        keys = [f"{target}.lora.{key}" for key in KEYS[:2]]
        parts = {key: tensors.get(name) for key, name in zip(KEYS, keys, strict=False)}
        if target in meta.targets:
            parts = portable(parts, meta.scaling[target], rank)
        else:
            sizes = (rank, linear.in_features), (linear.out_features, rank)
            parts = {key: torch.zeros(size) for key, size in zip(KEYS, sizes, strict=False)}
        found |= {name: parts[key] for key, name in zip(KEYS, keys, strict=False)}
    if not found:
        raise UserError(f"the base has no square Linear, and MiniMind updates no other; {way_out}")
    torch.save(found, path)
    return rank


@torch.no_grad()
def logits(path: Path, base: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What a file computes, a LoRA on ``base``, by nothing that our own files went through.

    A later version's is computed by a Llama, whose names and rotation it has.
    """
    tensors = read_minimind(path)
    theirs = any(name.startswith("model.") for name in tensors)
    model = twin(base, tokenizer) if theirs else copy.deepcopy(base)
    if any(".lora." in name for name in tensors):
        modules = dict(model.named_modules())
        for name in (name for name in tensors if name.endswith(f".lora.{KEYS[0]}")):
            target = name.removesuffix(f".lora.{KEYS[0]}")
            B = tensors[f"{target}.lora.{KEYS[1]}"]
            modules[target].weight += B.float() @ tensors[name].float()
    else:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return logits_of(model)
