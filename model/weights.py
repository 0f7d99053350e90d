"""Weights on disk: safe reading, base files that describe themselves, and the fingerprint that
tells bases apart.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from core.errors import UserError, reason_of
from core.files import atomic_write
from model.LMConfig import LMConfig
from model.model import MiniMindLM

FORMAT = 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what a file may hold
# The config values that change the arithmetic but no shape, ours and (where a config has none of
# them) Hugging Face's.
ARITHMETIC = ("n_heads", "n_kv_heads", "norm_eps", "rope_theta")
THEIR_ARITHMETIC = (
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_parameters",
)
# What a base file's record keeps of the config.
ARCHITECTURE = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "hidden_dim",
    "multiple_of",
)
ARCHITECTURE += ("norm_eps", "max_seq_len", "rope_theta", "dropout")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The flat ``{name: tensor}`` of a ``.pth`` file, on the CPU, with nothing in the file
    executed.

    Refused with one ``UserError``: a file that is missing, no zip archive, damaged (checksums),
    holds anything but dense tensors, floating point of another type than ``FLOATS``, or numbers
    that are not finite in fp32.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums: a flipped bit would load silently.
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path} is damaged (checksum of {damaged}); copy or train it again")
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # zipfile and the unpickler raise many kinds; whatever it is, the file is unusable
        reason = reason_of(error, 120)
        if type(error).__name__ == "UnpicklingError":  # torch's sentence is about its own flag
            reason = "it holds more than tensors"
        raise UserError(
            f"{path} is not a readable weights file ({reason}); copy or train it again"
        ) from error
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(
            f"{path} holds no weights but {type(tensors).__name__}; expected a state dict"
        )
    for name, tensor in tensors.items():
        is_dense = (
            isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        )
        if not isinstance(name, str) or not is_dense:
            raise UserError(
                f"{path} holds {name!r}, which is no dense tensor; expected a plain state dict"
            )
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise UserError(f"{path} holds {name} as {tensor.dtype}; convert it to float32")
        # The extremes of a tensor with a NaN are NaN; isfinite of the whole tensor would need much
        # time and memory.
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not torch.stack(tensor.aminmax()).float().isfinite().all()
        ):
            raise UserError(f"{path} holds NaN or infinity in {name}; go back to an earlier file")
    return tensors


def fingerprint(parameters: Iterable[tuple[str, Tensor]], config: object) -> str:
    """Hex SHA-256 of a model's weights: sorted names, shapes, values rounded to bf16, and
    ``arithmetic(config)``.

    The rounding lets a bf16 copy count as the same base. Pass ``named_parameters()``: it names tied
    tensors once.
    """
    digest = hashlib.sha256(json.dumps(arithmetic(config), sort_keys=True).encode())
    for name, tensor in sorted(parameters, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy()
        )
    return digest.hexdigest()


def arithmetic(config: object) -> dict:
    """The values of ``config`` that change what a model's weights compute; empty where there is no
    config.
    """

    def found(names: tuple[str, ...]) -> dict:
        return {name: value for name in names if (value := getattr(config, name, None)) is not None}

    return found(ARITHMETIC) or found(THEIR_ARITHMETIC)


def copy_strictly(own: dict[str, Tensor], tensors: dict[str, Tensor], source: str | Path) -> None:
    """Copy ``tensors`` into the like-named ``own`` ones (a state dict), in place, keeping their
    device and dtype.

    Raises ``UserError`` as ``check_keys`` does, before anything is copied.
    """
    check_keys(own, tensors, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check_keys(own: dict[str, Tensor], tensors: dict[str, Tensor], source: str | Path) -> None:
    """One ``UserError`` that names every missing, unexpected, mis-shaped and mistyped key of
    ``tensors``, if any.
    """
    problems = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - own.keys())]
    for name in sorted(own.keys() & tensors.keys()):
        if own[name].shape != tensors[name].shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}")
        elif not tensors[name].is_floating_point():
            problems.append(f"{name} is {tensors[name].dtype}, not floating point")
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}")


def model_of(config: LMConfig, tensors: dict[str, Tensor], source: str | Path) -> MiniMindLM:
    """The model whose parameters are ``tensors`` themselves (copies where they are not fp32): they
    exist only once.

    Raises ``UserError`` as ``check_keys`` does.
    """
    with torch.device("meta"):
        model = MiniMindLM(config)
    check_keys(model.state_dict(), tensors, source)
    model.load_state_dict(
        {name: tensor.float().contiguous() for name, tensor in tensors.items()}, assign=True
    )
    model.tie_weights()
    return model


def save_base(path: str | Path, model: MiniMindLM, meta: dict) -> None:
    """Write the state dict to ``path`` (.pth), then ``meta`` with config and fingerprint to the
    .json beside it.
    """
    path = Path(path)
    config = {name: getattr(model.config, name) for name in ARCHITECTURE}
    weights = fingerprint(model.named_parameters(), model.config)
    if any(".lora." in name for name in model.state_dict()):
        raise UserError("a base is saved without a LoRA; call remove_lora(model) first")
    record = {"format": FORMAT, **meta, "config": config, "fingerprint": weights}
    text = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    atomic_write(path, lambda file: torch.save(tensors, file))
    atomic_write(path.with_suffix(".json"), lambda file: file.write(text))


def load_base(path: str | Path, device: torch.device | str = "cpu") -> tuple[MiniMindLM, dict]:
    """The model in a base file, in eval mode on ``device``, and its ``.json`` record.

    A ``.pth`` alone (MiniMind's) loads too: its shapes give the config, the rest are defaults,
    printed; its record holds only ``config`` and ``fingerprint``. Raises ``UserError`` for
    unreadable or unfitting weights, tied tensors that differ, or a record that does not belong to
    the weights.
    """
    path = Path(path)
    tensors = read_tensors(path)
    # Files of older MiniMind versions carry the causal mask and the rotary table; both are computed
    # here.
    tensors = {
        name: t for name, t in tensors.items() if name != "pos_cis" and not name.endswith(".mask")
    }
    record = read_record(path)
    try:
        if record:
            architecture = {name: record["config"][name] for name in ARCHITECTURE}
        else:
            architecture = _config_from_shapes(tensors, path)
        config = LMConfig(**architecture)
    except (KeyError, TypeError) as error:
        beside = path.with_suffix(".json")
        raise UserError(
            f"{beside} describes no possible model ({error}); delete it or retrain"
        ) from error
    except UserError as error:
        source = path.with_suffix(".json") if record else path
        raise UserError(f"{source} describes no possible model: {error}") from error
    head, embedding = tensors.get("output.weight"), tensors.get("tok_embeddings.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(
            f"{path}: output.weight and tok_embeddings.weight differ, but this model ties them"
        )
    model = model_of(config, tensors, path)
    weights = fingerprint(model.named_parameters(), config)
    if record.get("fingerprint", weights) != weights:
        raise UserError(
            f"{path} and {path.with_suffix('.json')} are not from the same run; delete the .json or retrain"
        )
    return model.to(device).eval(), {**record, "config": architecture, "fingerprint": weights}


def read_record(path: Path) -> dict:
    """The ``.json`` beside a base file; empty when there is none. Raises ``UserError`` for a broken
    one.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{beside} is not readable JSON ({error}); delete it or retrain the base"
        ) from error
    described = isinstance(record, dict) and isinstance(record.get("config"), dict)
    if not described or not isinstance(record.get("options", {}), dict):
        raise UserError(f"{beside} describes no base; delete it or retrain the base")
    return record


def _config_from_shapes(tensors: dict[str, Tensor], path: Path) -> dict:
    try:
        vocab_size, dim = tensors["tok_embeddings.weight"].shape
        n_layers = 1 + max(
            int(name.split(".")[1]) for name in tensors if name.startswith("layers.")
        )
        hidden_dim = tensors["layers.0.feed_forward.w1.weight"].shape[0]
        kv_width = tensors["layers.0.attention.wk.weight"].shape[0]
        if not dim:
            raise ValueError("its embedding is empty")
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} is no MiniMindLM: it lacks the embedding or the layers ({error})"
        ) from error
    n_heads = LMConfig().n_heads
    n_kv_heads = max(1, kv_width * n_heads // dim)
    config = {"dim": dim, "n_layers": n_layers, "hidden_dim": hidden_dim, "vocab_size": vocab_size}
    config |= {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
    assumed = {name: getattr(LMConfig(), name) for name in ARCHITECTURE if name not in config}
    print(f"{path} has no .json beside it: from its shapes {config}, assumed {assumed}")
    return config | assumed


def short(fingerprint: str) -> str:
    """Enough of a fingerprint to tell two apart by eye."""
    return fingerprint[:12]
