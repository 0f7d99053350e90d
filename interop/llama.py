"""A base as a Llama folder of Hugging Face, and back: stock classes, no code of ours in it.

Both compute the same, but their rotary features turn in halves (i with i + head_dim / 2), ours in
pairs (2i with 2i + 1): within each head, the rows of wq and wk have another order.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from core.errors import UserError, reason_of
from core.options import require
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.weights import assembled, check_tensors

# Our modules and theirs; the tied head has no tensor of its own.
OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm"}
LAYER = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
LAYER |= {f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
LAYER |= {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj"}
LAYER |= {"feed_forward.w3": "mlp.up_proj"}
HEADS = {"wq": "n_heads", "wk": "n_kv_heads"}  # the modules whose output is rotated
# Config entries of both, beside those of the rotary embedding.
SAME = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
SAME |= {"n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size"}
SAME |= {"vocab_size": "vocab_size", "norm_eps": "rms_norm_eps"}
SAME |= {"max_seq_len": "max_position_embeddings"}
# What a Llama must be to fit a MiniMindLM; all are Hugging Face's defaults.
MUST_BE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
COMPUTED = ".rotary_emb.inv_freq"  # end of names in old files: a table that both compute


def their_module(ours: str) -> str:
    """``layers.0.attention.wq`` as ``model.layers.0.self_attn.q_proj``."""
    if ours in OUTER:
        return OUTER[ours]
    _, layer, rest = ours.split(".", 2)
    return f"model.layers.{layer}.{LAYER[rest]}"


def our_modules(config: LMConfig) -> dict[str, str]:
    """Our name of each module of a Llama that has a weight, by theirs."""
    layers = [f"layers.{n}.{name}" for n in range(config.n_layers) for name in LAYER]
    return {their_module(name): name for name in (*OUTER, *layers)}


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """``rows`` (heads * head_dim, ...) of rotated features from our order to Hugging Face's."""
    pairs = rows.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse of ``to_halves``."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def rotary_heads(module: str, config: LMConfig) -> int:
    """The heads of our module whose output is rotated; 0 for the other modules."""
    return getattr(config, HEADS.get(module.rpartition(".")[2], ""), 0)


def to_llama(tensors: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """A state dict of ours by their names, in their order of features."""
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module == "output":
            continue
        heads = rotary_heads(module, config)
        found[f"{their_module(module)}.weight"] = to_halves(tensor, heads) if heads else tensor
    return found


def from_llama(tensors: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """The inverse of ``to_llama``. Other names and shapes stay, for a strict load to report."""
    modules, found = our_modules(config), {}
    for name, tensor in tensors.items():
        module = modules.get(name.removesuffix(".weight"), "")
        heads = rotary_heads(module, config)
        fits = heads and tensor.size()[:1] == (heads * (config.dim // config.n_heads),)
        found[f"{module}.weight" if module else name] = to_pairs(tensor, heads) if fits else tensor
    embedding = found.get("tok_embeddings.weight")
    if embedding is not None:
        found["output.weight"] = found.pop("lm_head.weight", embedding)
    return found


def llama_config(config: LMConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> dict:
    """Their config.json, as transformers 4 and 5 and mlx-lm read it.

    The last two look for the base of the rotary embedding, and all for the dtype, under different
    names.
    """
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in SAME.items()},
        "head_dim": config.dim // config.n_heads,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **MUST_BE,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        **special_ids(tokenizer),
        "dtype": name,
        "torch_dtype": name,
    }


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: x for name in names if (x := getattr(tokenizer, name)) is not None}


def save_llama(
    model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Write the files of a Llama folder into ``folder``, the weights in ``dtype``."""
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    tensors = {n: t.to(dtype) for n, t in to_llama(tensors, model.config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", llama_config(model.config, tokenizer, dtype))
    _write_json(folder / "generation_config.json", special_ids(tokenizer))
    mode = (folder / "config.json").stat().st_mode
    (folder / "model.safetensors").chmod(mode)  # safetensors: 0600
    write_tokenizer(tokenizer, folder, model.config.max_seq_len)


def twin(model: MiniMindLM, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The Llama that computes what ``model`` does without its LoRA; for checking."""
    config = LlamaConfig(**llama_config(model.config, tokenizer, torch.float32))
    llama, tensors = LlamaForCausalLM(config), model.state_dict()
    own = {name: tensor for name, tensor in tensors.items() if ".lora." not in name}
    llama.load_state_dict(to_llama(own, model.config), strict=False)  # the tied head is not named
    return llama.eval()


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, max_seq_len: int) -> None:
    """Write a tokenizer's files into ``folder``, as transformers 4 and 5 read them.

    Version 5 itself writes them otherwise. Raises ``UserError`` for several chat templates.
    """
    template = only_template(tokenizer)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    settings = {name: token for name, token in tokens.items() if token is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len}
    # By default version 4 adds token_type_ids, which a Llama does not take.
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    settings |= {"clean_up_tokenization_spaces": False, "chat_template": template}
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_bytes(template.encode())


def only_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Its chat template. Raises ``UserError`` for several."""
    several = f"the tokenizer in {tokenizer.name_or_path} has several chat templates"
    way_out = "of which a base can have one; keep one in its tokenizer_config.json"
    require(isinstance(tokenizer.chat_template, str), f"{several}, {way_out}")
    return tokenizer.chat_template


def _write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode())


def load_llama(folder: Path) -> MiniMindLM:
    """The fp32 model of a Llama folder, in eval mode.

    Raises ``UserError`` for a folder that is damaged or no Llama, and for a Llama that computes
    what a MiniMindLM cannot.
    """
    config, tensors = read_config(folder), read_shards(folder)
    layers = f"{folder}: config.json says num_hidden_layers {config.n_layers}"
    enough = config.n_layers <= len(tensors)  # or a wrong number would keep us busy for long
    require(enough, f"{layers}, but there are only {len(tensors)} tensors; copy it again")
    return assembled(config, from_llama(tensors, config), folder)


def read_config(folder: Path) -> LMConfig:
    """The config of a Llama folder as ours. Raises ``UserError`` for one that has no equal."""
    path = folder / "config.json"
    require(path.is_file(), f"{path} does not exist; name the folder of a model")
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no model's config ({reason_of(error)})") from error
    quantised = f"{path}: the weights are quantised (quantization_config), and cannot be converted"
    require(not content.get("quantization_config"), f"{quantised}; name the full weights")
    kind = content.get("model_type")
    require(kind == "llama", f"{path}: model_type {kind!r} is not llama, and cannot be converted")
    rope = content.get("rope_scaling") or content.get("rope_parameters")
    kinds = [rope.get("rope_type"), rope.get("type")] if isinstance(rope, dict) else []
    wrong = [f"rope_scaling of type {kind!r}" for kind in kinds if kind not in (None, "default")]
    require(not wrong, f"{path}: a MiniMindLM has no {', '.join(wrong)}")
    try:
        theirs = LlamaConfig.from_dict(content)  # with the defaults of what is not said
        ours = {name: getattr(theirs, entry) for name, entry in SAME.items()}
        config = LMConfig(**ours, rope_theta=theirs.rope_parameters["rope_theta"])
    except Exception as error:  # the library's own checks raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} describes no possible model ({reason})") from error
    found = {entry: getattr(theirs, entry) for entry in MUST_BE}
    wrong = [f"{entry} {found[entry]!r}" for entry in MUST_BE if found[entry] != MUST_BE[entry]]
    if theirs.head_dim * config.n_heads != config.dim:
        wrong.append(f"head_dim {theirs.head_dim}")
    require(not wrong, f"{path}: a MiniMindLM has no {', '.join(wrong)}")
    return config


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of all safetensors files that ``folder`` names, checked."""
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    try:
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(shards.values()))
        outside = [name for name in files if Path(name).name != name]
        require(not outside, f"{index} names {outside[:1]}, which lies outside the folder")
        has_any = any((folder / name).is_file() for name in files)
        others = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        way_out = "save it as safetensors, by save_pretrained of transformers"
        require(has_any or not others, f"{folder} holds its weights as {others[:1]}; {way_out}")
        tensors = {}
        for name in files:
            tensors |= load_file(folder / name)
        tensors = {name: t for name, t in tensors.items() if not name.endswith(COMPUTED)}
    except UserError:
        raise
    except Exception as error:  # json, the file system and safetensors raise many kinds
        unreadable = f"the weights in {folder} cannot be read ({reason_of(error)})"
        raise UserError(f"{unreadable}; copy them again") from error
    check_tensors(tensors, folder)
    return tensors
