"""Bases and skills as GGUF files, which llama.cpp and Ollama read.

Their Llama turns rotary features in pairs, as ours does, so no row changes its place.
"""

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.options import require
from interop.check import difference, logits_of, require_same, tolerance
from interop.llama import only_template
from interop.rounding import kept
from interop.updates import check_updates_only, portable
from model.LMConfig import LMConfig
from model.lora.layer import exchange
from model.lora.skill_file import KEYS, Skill, base_fingerprint
from model.model import MiniMindLM
from model.weights import assembled

# Our modules and theirs; the tied head has no tensor of its own.
OUTER = {"tok_embeddings": "token_embd", "norm": "output_norm"}
LAYER = {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wo": "attn_output"}
LAYER |= {f"attention.w{x}": f"attn_{x}" for x in "qkv"}
LAYER |= {f"feed_forward.w{n}": f"ffn_{x}" for n, x in enumerate(("gate", "down", "up"), 1)}
# Config entries of both: whole numbers, and others.
SIZES = {"dim": "embedding_length", "n_layers": "block_count", "vocab_size": "vocab_size"}
SIZES |= {"n_heads": "attention.head_count", "n_kv_heads": "attention.head_count_kv"}
SIZES |= {"hidden_dim": "feed_forward_length", "max_seq_len": "context_length"}
REALS = {"norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}
FINGERPRINT = "minimind.fingerprint"  # an entry of ours: the base that a file was made from
# What matrices are written in, and what a file of them is called.
FORMATS = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
FORMATS |= {"q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
# What a tokenizer must be for llama.cpp's "gpt-2" to read every text alike.
SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BPE = {"type": "BPE", "dropout": None, "ignore_merges": False}
BPE |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
SWALLOWS = ("single_word", "lstrip", "rstrip")  # what an added token may not do
CONVERTER = "write the format huggingface and let llama.cpp's convert_hf_to_gguf.py convert that"


def save_base(
    model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: str
) -> tuple[float, float]:
    """Write ``model``, which carries no LoRA, as ``path`` (.gguf), with its fingerprint.

    ``dtype``, one of ``FORMATS``, is that of the matrices; norms stay fp32. Returns by what share
    of the largest logit the file, read again, differs from our own rounding of the same weights,
    and from ``model``. Raises ``UserError`` where the first is too much, and for a tokenizer or
    sizes that have no equal there.
    """
    gguf, names, ours = library(), modules(model.config), {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType[FORMATS[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(FINGERPRINT, base_fingerprint(model))
    add_config(writer, model.config)
    add_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        tensor, module = tensor.detach().float().cpu(), name.removesuffix(".weight")
        stored = dtype if tensor.ndim == 2 else "float32"
        ours[name] = kept(tensor, stored, name)
        if module in names:
            add_tensor(writer, f"{names[module]}.weight", tensor, stored)
    write(writer)
    expected, found = (logits_of(m) for m in (assembled(model.config, ours, path), read_base(path)))
    return require_same(expected, found, path.name), difference(logits_of(model), found)


def save_adapter(skill: Skill, model: MiniMindLM, path: Path) -> float:
    """Write ``skill``, which ``model`` carries, as ``path`` (.gguf).

    Returns by what share of the largest logit the adapter, read again, differs. Raises
    ``UserError`` where that is too much, and for a skill that is more than a LoRA of the blocks'
    Linears.
    """
    tensors, meta = skill
    check_updates_only(tensors)
    is_dora = any(name.endswith(".magnitude") for name in tensors)
    way_out = "merge it into a base with skill instead of lora_name"
    require(not is_dora, f"a DoRA rescales weights, which no GGUF adapter can: {way_out}")
    names, rank = modules(model.config), max(meta.ranks.values())
    shared = [target for target in meta.targets if target in OUTER or target not in names]
    way_out = "which shares its weight, so llama.cpp cannot adapt it; train the skill without"
    require(not shared, f"the skill updates {', '.join(shared)}, {way_out}")
    writer = library().GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_name(path.stem)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", rank)
    for target in meta.targets:
        parts = {key: tensors[f"{target}.lora.{key}"] for key in KEYS[:2]}
        parts = portable(parts, meta.scaling[target], rank)
        add_tensor(writer, f"{names[target]}.weight.lora_a", parts["A.weight"], "float32")
        add_tensor(writer, f"{names[target]}.weight.lora_b", parts["B.weight"], "float32")
    write(writer)
    ours, theirs, alone = (logits_of(m) for m in (model, *with_and_without(model, path)))
    return require_same(ours, theirs, path.name, tolerance(ours, alone))


def library() -> ModuleType:
    """llama.cpp's own package for such files. ``UserError`` says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install gguf") from error
    return gguf


def modules(config: LMConfig) -> dict[str, str]:
    """Their name of each of our modules that has a weight of its own."""
    names = dict(OUTER)
    for n in range(config.n_layers):
        names |= {f"layers.{n}.{ours}": f"blk.{n}.{theirs}" for ours, theirs in LAYER.items()}
    return names


def add_config(writer: Any, config: LMConfig) -> None:
    """Add what ``read_base`` needs to know, and the width of a head."""
    for name, entry in SIZES.items():
        writer.add_uint32(f"llama.{entry}", getattr(config, name))
    for name, entry in REALS.items():
        writer.add_float32(f"llama.{entry}", getattr(config, name))
    for entry in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        writer.add_uint32(f"llama.{entry}", config.dim // config.n_heads)


def add_tensor(writer: Any, name: str, tensor: Tensor, dtype: str) -> None:
    """Add ``tensor``, fp32, in the format ``dtype``."""
    gguf = library()
    kind = gguf.GGMLQuantizationType[FORMATS[dtype].partition("_")[2]]
    writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add vocabulary, merges and chat template. ``UserError`` if llama.cpp would read otherwise."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    split, bpe = backend["pre_tokenizer"] or {}, backend["model"]
    wrong = [f"{key} {split.get(key)!r}" for key in SPLIT if split.get(key) != SPLIT[key]]
    wrong += [f"{key} {bpe[key]!r}" for key in BPE if (bpe.get(key) or BPE[key]) != BPE[key]]
    wrong += ["a normalizer"] * (backend["normalizer"] is not None)
    added = {token["id"]: token for token in backend["added_tokens"]}
    wrong += [f"{key} {t['content']!r}" for t in added.values() for key in SWALLOWS if t[key]]
    reads = "so llama.cpp, which has no such, would read texts otherwise"
    require(not wrong, f"the tokenizer has {', '.join(wrong[:3])}, {reads}; {CONVERTER}")
    template, begins = only_template(tokenizer), adds_bos(tokenizer)
    ids = range(len(tokenizer))
    kinds = library().TokenType
    ours = {True: kinds.CONTROL, False: kinds.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(ids))
    writer.add_token_types([ours[added[n]["special"]] if n in added else kinds.NORMAL for n in ids])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    for role in ("bos", "eos", "pad", "unk"):
        if (token_id := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(template)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with bos.

    llama.cpp then begins chats with it, too, once. Raises ``UserError`` for a tokenizer that adds
    anything else, and for one whose chats do not begin so.
    """
    plain, whole = (tokenizer("a", add_special_tokens=x).input_ids for x in (False, True))
    if plain == whole:
        return False
    adds = f"the tokenizer makes {tokenizer.convert_ids_to_tokens(whole)} of the text 'a'"
    reads = "so llama.cpp, which can only put bos before it, would read texts otherwise"
    require([tokenizer.bos_token_id, *plain] == whole, f"{adds}, {reads}; {CONVERTER}")
    chat = [{"role": "user", "content": "a"}]
    written = tokenizer.apply_chat_template(chat, tokenize=False)
    reads = "but no chat, so llama.cpp, which has one rule for both, would read chats otherwise"
    begins = written.startswith(tokenizer.bos_token)
    require(begins, f"the tokenizer begins every text with bos, {reads}; {CONVERTER}")
    return True


def write(writer: Any) -> None:
    """Write the file of all that was added."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entries of a file's header, and its tensors as fp32, both by name."""
    gguf = library()
    reader = gguf.GGUFReader(path)
    entries = {name: field.contents() for name, field in reader.fields.items()}
    # Copies: on Windows a file that is mapped into memory cannot be renamed.
    dense = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).copy() for t in reader.tensors}
    return entries, {name: torch.from_numpy(array) for name, array in dense.items()}


def doubts(path: Path, model: MiniMindLM) -> str:
    """Why the file ``path`` may be no base for skills of ``model``; empty if it is one."""
    gguf = library()
    if not path.exists():
        return "does not exist yet"
    try:
        field = gguf.GGUFReader(path).get_field(FINGERPRINT)
    except Exception:  # any file may be there
        return "is no GGUF file"
    if field is None:
        return "does not say which base it is"
    return "" if field.contents() == base_fingerprint(model) else "is another base"


def read_base(path: Path) -> MiniMindLM:
    """The model of a base that ``save_base`` wrote, by what the file alone says."""
    entries, tensors = read_file(path)
    config = LMConfig(**{name: entries[f"llama.{e}"] for name, e in (SIZES | REALS).items()})
    ours = {f"{n}.weight": tensors[f"{theirs}.weight"] for n, theirs in modules(config).items()}
    return assembled(config, ours | {"output.weight": ours["tok_embeddings.weight"]}, path)


@torch.no_grad()
def with_and_without(model: MiniMindLM, path: Path) -> tuple[MiniMindLM, MiniMindLM]:
    """``model`` with an adapter's alpha / rank * B A in place of its LoRA, and with neither."""
    entries, tensors = read_file(path)
    alone = copy.deepcopy(model)
    exchange(alone, {})
    merged = copy.deepcopy(alone)
    for name, theirs in modules(model.config).items():
        A, B = (tensors.pop(f"{theirs}.weight.lora_{end}", None) for end in "ab")
        if A is not None:
            scale = entries["adapter.lora.alpha"] / B.size(1)
            merged.get_submodule(name).weight += scale * (B @ A)
    require(not tensors, f"{path} holds {sorted(tensors)[:3]}, which fit nothing")
    return merged, alone
