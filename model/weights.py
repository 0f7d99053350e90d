"""Base files (a state dict, .pth, and its record, .json), their fingerprints, and which to use."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from core.errors import UserError, reason_of
from core.files import atomic_write
from core.paths import STAGES, is_pretrained
from model.archive import check_archive
from model.huggingface import open_causal
from model.LMConfig import LMConfig
from model.model import MiniMindLM

FORMAT = 1
LAYER_TENSORS = 9  # of seven Linears and two norms
PRETRAINED = "pretrained elsewhere"  # the stage in the record of a Hugging Face base
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what a file may hold
# The config values that change the arithmetic but no shape: ours, else Hugging Face's.
ARITHMETIC = ("n_heads", "n_kv_heads", "norm_eps", "rope_theta")
HEADS = ("num_attention_heads", "num_key_value_heads")
THEIR_ARITHMETIC = (*HEADS, "rms_norm_eps", "layer_norm_eps", "rope_parameters")
# What a base file's record keeps of the config.
SHAPES = ("dim", "n_layers", "vocab_size", "hidden_dim", "multiple_of", "max_seq_len", "dropout")
ARCHITECTURE = SHAPES + ARITHMETIC
AnyRecord = TypeVar("AnyRecord", bound="Record")


@dataclass(kw_only=True)
class Record:
    """What a file says of the run that made it. Tokenizers and weights are named by fingerprint."""

    format: int = FORMAT
    stage: str | None = None
    base: dict | None = None  # what the run started from: its "file" and "fingerprint"
    tokenizer: str | None = None
    data: list = field(default_factory=list)  # each file's "option", "file" and "sha256"
    options: dict = field(default_factory=dict)  # for people to read
    metrics: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)  # entries of other names, which are kept

    # Entries that earlier versions wrote among the options only.
    ONCE_OPTIONS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_json(cls: type[AnyRecord], content: object) -> AnyRecord:
        """The record that ``to_json`` gave. Raises ``ValueError`` for anything else."""
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        kinds = {entry.name: entry.type for entry in fields(cls) if entry.name != "more"}
        known = {name: content[name] for name in kinds if content.get(name) is not None}
        for name, value in known.items():
            if not isinstance(value, kinds[name]):
                raise ValueError(f"{name} is {value!r}")
        options = known.get("options", {})
        once = {name: options[name] for name in cls.ONCE_OPTIONS if name in options}
        more = {name: content[name] for name in content.keys() - kinds.keys()}
        return cls(**{**once, **known}, more=more)

    def to_json(self) -> dict:
        """What a file holds: every entry that is known."""
        entries = dict(vars(self))
        entries |= entries.pop("more")
        return {name: value for name, value in entries.items() if value is not None}


@dataclass(kw_only=True)
class RunRecord(Record):
    """The ``.json`` beside a base file. ``val_ratio``: the share of rows that its run held out."""

    val_ratio: int | float | None = None
    config: dict = field(default_factory=dict)
    fingerprint: str | None = None

    ONCE_OPTIONS = ("val_ratio",)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The flat ``{name: tensor}`` of a ``.pth`` file, on the CPU; nothing in the file is executed.

    Raises ``UserError`` for a missing or damaged file (checksums), and for one that holds anything
    but dense tensors of ``FLOATS`` or whole numbers, finite in fp32.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        check_archive(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zipfile and the unpickler raise many kinds: the file is unusable
        unreadable = f"{path} is not a readable weights file ({reason_of(error, 120)})"
        raise UserError(f"{unreadable}; copy or train it again") from error
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds a {type(tensors).__name__}, not a state dict of weights")
    check_tensors(tensors, path, path.stat().st_size)
    return tensors


def check_tensors(tensors: dict[str, Tensor], path: str | Path, size: float = math.inf) -> None:
    """Raise ``UserError`` unless these are dense tensors, of ``FLOATS`` and finite or whole.

    They must not be larger than the file, whose ``size`` is in bytes.
    """
    stored = {}
    for name, tensor in tensors.items():
        is_tensor = isinstance(name, str) and isinstance(tensor, Tensor)
        if not is_tensor or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{path} holds {name!r}, which is no dense tensor of a state dict")
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
    # A stride of 0 makes a few bytes as large as one likes. Tied tensors share what is stored.
    held = sum(tensor.nbytes for tensor in tensors.values())
    if held > 3 * sum(stored.values()) or sum(stored.values()) > size:
        raise UserError(f"{path} holds tensors that are larger than the file; do not open it")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path} holds {name} as {tensor.dtype}; convert it to float32")
        # A NaN makes the extremes NaN. isfinite of the whole tensor would need time and memory.
        if not torch.stack(tensor.aminmax()).float().isfinite().all():
            raise UserError(f"{path} holds NaN or infinity in {name}; go back to an earlier file")


def fingerprint(parameters: Iterable[tuple[str, Tensor]], config: object) -> str:
    """Hex SHA-256 of ``arithmetic(config)`` and the weights' names, shapes and bf16 values."""
    digest = hashlib.sha256(json.dumps(arithmetic(config), sort_keys=True).encode())
    for name, tensor in sorted(parameters, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).numpy())
    return digest.hexdigest()


def arithmetic(config: object) -> dict:
    """The values of ``config`` that change what weights compute; {} where there is no config."""
    for names in (ARITHMETIC, THEIR_ARITHMETIC):
        found = {name: getattr(config, name, None) for name in names}
        if found := {name: value for name, value in found.items() if value is not None}:
            return found
    return {}


def check_keys(own: dict[str, Tensor], tensors: dict[str, Tensor], source: str | Path) -> None:
    """Raise one ``UserError`` for all keys of ``tensors`` that differ from ``own``, if any do."""
    problems = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - own.keys())]
    for name in sorted(own.keys() & tensors.keys()):
        if own[name].shape != tensors[name].shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}")
        elif not tensors[name].is_floating_point():
            problems.append(f"{name} is {tensors[name].dtype}, not floating point")
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}")


def save_base(path: str | Path, model: MiniMindLM, record: RunRecord | None = None) -> None:
    """Write weights, then ``record`` with config and fingerprint. ``UserError`` if LoRA is on."""
    path, tensors = Path(path), model.state_dict()
    if any(".lora." in name for name in tensors):
        raise UserError("a base is saved without a LoRA; call remove_lora(model) first")
    config = {name: getattr(model.config, name) for name in ARCHITECTURE}
    known = fingerprint(model.named_parameters(), model.config)
    record = replace(record or RunRecord(), config=config, fingerprint=known)
    text = json.dumps(record.to_json(), indent=2, ensure_ascii=False) + "\n"
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    atomic_write(path, lambda file: torch.save(tensors, file))
    atomic_write(path.with_suffix(".json"), lambda file: file.write(text.encode()))


def load_base(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, RunRecord]:
    """The model of a base file or a Hugging Face name, fp32 in eval mode, and its record.

    A file's own tensors become the parameters, copied where they are not fp32. A ``.pth`` alone
    (MiniMind's) loads too: its shapes give the config, the rest are defaults, printed. Records of
    such files and of Hugging Face models hold ``config``, ``fingerprint`` and no more, but for the
    latter's ``stage``. Raises ``UserError`` for what cannot be loaded: unreadable or unfitting
    weights, tied tensors that differ, or a record of other weights.
    """
    path = Path(path)
    if is_pretrained(path):
        model = open_causal(path)
        record = RunRecord(stage=PRETRAINED, config={"vocab_size": model.config.vocab_size})
        record.fingerprint = fingerprint(model.named_parameters(), model.config)
        return model.to(device), record
    beside, record, held = path.with_suffix(".json"), read_record(path), read_tensors(path)
    if any(".lora." in name for name in held):
        raise UserError(f"{path} is a skill, not a base: name the base that it was trained on")
    # Older MiniMind versions saved the rotary table and the causal mask, which we compute.
    names = [name for name in held if name != "pos_cis" and not name.endswith(".mask")]
    tensors = {name: held[name] for name in names}
    described = record.config or config_from_shapes(tensors, path)
    try:
        architecture = {name: described[name] for name in ARCHITECTURE}
        config = LMConfig(**architecture)
    except (KeyError, TypeError, UserError) as error:
        wrong = f"{beside} describes no possible model ({error})"
        raise UserError(f"{wrong}; correct it or retrain the base") from error
    model = assembled(config, tensors, path)
    found = fingerprint(model.named_parameters(), config)
    if record.fingerprint not in (None, found):
        differ = f"{path} and {beside} are not from the same run"
        raise UserError(f"{differ}; delete the .json or retrain")
    return model.to(device), replace(record, config=architecture, fingerprint=found)


def assembled(config: LMConfig, tensors: dict[str, Tensor], source: str | Path) -> MiniMindLM:
    """The fp32 model of these weights, in eval mode. Raises ``UserError`` if they do not fit."""
    if LAYER_TENSORS * config.n_layers > len(tensors):  # to build so many would take for ever
        layers = f"there are {config.n_layers} layers, but only {len(tensors)} tensors"
        raise UserError(f"{source} does not fit the model: {layers}")
    with torch.device("meta"):
        model = MiniMindLM(config)
    check_keys(model.state_dict(), tensors, source)
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    if not torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"]):
        differ = "output.weight and tok_embeddings.weight differ"
        raise UserError(f"{source}: {differ}, but this model ties them")
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.eval()


def read_record(path: Path) -> RunRecord:
    """The record beside a base file, or an empty one. Raises ``UserError`` if it is broken."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return RunRecord()
    try:
        record = RunRecord.from_json(json.loads(beside.read_text(encoding="utf-8")))
        if not record.config:
            raise ValueError("it has no config")
    except (ValueError, RecursionError) as error:
        way_out = "delete it or retrain the base"
        raise UserError(f"{beside} describes no base ({error}); {way_out}") from error
    return record


def config_from_shapes(tensors: dict[str, Tensor], path: Path) -> dict:
    """``ARCHITECTURE`` of a file without a record. Raises ``UserError`` for another model."""
    try:
        vocab_size, dim = tensors["tok_embeddings.weight"].shape
        layers = [int(name.split(".")[1]) for name in tensors if name.startswith("layers.")]
        hidden_dim = tensors["layers.0.feed_forward.w1.weight"].shape[0]
        kv_width = tensors["layers.0.attention.wk.weight"].shape[0]
        if not dim:
            raise ValueError("its embedding is empty")
        if max(layers) >= len(tensors):
            raise ValueError(f"there is a layer {max(layers)}, but only {len(tensors)} tensors")
        defaults = LMConfig()
        config = {"dim": dim, "n_layers": 1 + max(layers), "hidden_dim": hidden_dim}
        config |= {"vocab_size": vocab_size, "n_heads": defaults.n_heads}
        config["n_kv_heads"] = max(1, kv_width * defaults.n_heads // dim)
        assumed = {name: getattr(defaults, name) for name in ARCHITECTURE if name not in config}
        LMConfig(**config, **assumed)
    except UserError as error:
        raise UserError(f"{path} describes no possible model ({error})") from error
    except (KeyError, ValueError, IndexError) as error:
        lacks = f"it lacks the embedding or the layers ({error})"
        raise UserError(f"{path} is no MiniMindLM: {lacks}") from error
    print(f"{path} has no .json beside it: from its shapes {config}, assumed {assumed}")
    return config | assumed


def choose_base(
    out_dir: str | Path,
    named: Path | None = None,
    skill_base: dict | None = None,  # the ``base`` of a SkillMeta
    stages: Iterable[str] = STAGES,
) -> Path:
    """The base that is ``named``, or else a skill's own, or else the newest of the latest stage."""
    if named is not None:
        if not named.is_file() and not is_pretrained(named):
            wrong = "is a folder without config.json" if named.is_dir() else "does not exist"
            way_out = "name a base file, a Hugging Face folder or owner/model"
            raise UserError(f"base {named} {wrong}; {way_out}")
        return named
    folder, skill_base = Path(out_dir), skill_base or {}
    if wanted := skill_base.get("fingerprint"):
        for path in sorted(folder.glob("*.pth")):
            with contextlib.suppress(UserError):  # a broken record of another base
                if read_record(path).fingerprint == wanted:
                    return path
    for stage in reversed(list(stages)):
        found = [path for path in folder.glob(f"{stage}_*.pth") if path.is_file()]  # no dead link
        if found:
            return max(found, key=lambda path: path.stat().st_mtime_ns)
    there = f"no base model {' or '.join(f'{stage}_*.pth' for stage in stages)} in {folder}"
    if file := skill_base.get("file"):
        raise UserError(f"there is {there}; the skill was trained on {file}: name that one as base")
    raise UserError(f"{there}; train one, or name a base or another out_dir")
