"""Every path rule. ``out_dir`` is relative to the caller's folder, bundled files to the code."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from core.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER_DIR = REPOSITORY / "model" / "minimind_tokenizer"
# /lora off means: no skill; tables name what has none "base".
RESERVED = ("off", "base")
# The names that lora_path gives.
SKILL_FILE = re.compile(rf"lora_(?!lora_|({'|'.join(RESERVED)})_\d+\.pth)\w[\w.-]*_\d+\.pth")
STAGES = ("pretrain", "full_sft", "rlhf")  # in the order in which they are trained


def base_path(out_dir: str | Path, stage: str, dim: int) -> Path:
    """``out/<stage>_512.pth``; ``stage`` is one of ``STAGES``."""
    return Path(out_dir) / f"{stage}_{dim}.pth"


def lora_path(out_dir: str | Path, name: str, dim: int | str) -> Path:
    """``out/lora/lora_<name>_<dim>.pth``, for the names ``medical`` and ``lora_medical`` alike."""
    return Path(out_dir) / "lora" / f"lora_{skill_name(name)}_{dim}.pth"


def classifier_dir(out_dir: str | Path, name: str) -> Path:
    """``out/classifier_<name>``, the Hugging Face folder of a classifier without LoRA."""
    return Path(out_dir) / f"classifier_{skill_name(name)}"


def lora_paths(out_dir: str | Path, name: str | None = None) -> list[Path]:
    """The skill files in ``out_dir``, the newest last: of every dim, of skill ``name`` if given."""
    files = (path for path in (Path(out_dir) / "lora").glob("lora_*.pth") if path.is_file())
    found = [path for path in files if SKILL_FILE.fullmatch(path.name)]
    found = [path for path in found if name is None or skill_of(path) == skill_name(name)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def find_skill(out_dir: str | Path, name: str, dim: int | None = None) -> Path:
    """The file of skill ``name``, of this ``dim`` or the newest. Raises ``UserError`` for none."""
    found = [lora_path(out_dir, name, dim)] if dim else lora_paths(out_dir, name)
    if not found or not found[-1].is_file():
        if others := lora_paths(out_dir, name):
            raise UserError(f"{others[-1]} is a skill of another base than this one: name its base")
        there = ", ".join(sorted({skill_of(path) for path in lora_paths(out_dir)})) or "none yet"
        wanted = lora_path(out_dir, name, dim or "<dim>")
        raise UserError(f"there is no skill file {wanted}; skills here: {there}")
    return found[-1]


def skill_of(path: Path) -> str:
    """The skill name in a file name that ``lora_path`` made."""
    return path.stem.removeprefix("lora_").rpartition("_")[0]


def skill_name(name: str) -> str:
    """The bare name of a skill, without ``lora_`` in front. Raises ``UserError``."""
    bare = re.sub(r"^(lora_)+", "", name)
    too_long = len(os.fsencode(bare)) > 100  # of the 255 bytes that file systems give a name
    if too_long or bare in RESERVED or not re.fullmatch(r"\w[\w.-]*", bare):
        taken = " or ".join(map(repr, RESERVED))
        allowed = f"letters, digits, '_', '-', '.' (at most 100 bytes), not {taken}"
        raise UserError(f"{name[:99]!r} is not a skill name: use {allowed}")
    return bare


def skill_weights(words: Iterable[str]) -> dict[str, float]:
    """Names and weights from ``NAME=0.7`` and ``NAME``, which weighs 1. Raises ``UserError``."""
    weights = {}
    for word in words:
        name, equals, number = word.partition("=")
        name = skill_name(name)
        if name in weights:
            raise UserError(f"skill {name} is named twice; give it one weight")
        try:
            weights[name] = float(number) if equals else 1.0
        except ValueError as error:
            raise UserError(f"{word!r} is no skill's weight: write NAME or NAME=0.5") from error
    return weights


def weights_text(weights: Mapping[str, float]) -> str:
    """The words that ``skill_weights`` reads as ``weights``."""
    words = (name if weight == 1 else f"{name}={weight:g}" for name, weight in weights.items())
    return " ".join(words)


def is_pretrained(base: Path) -> bool:
    """Whether this names a Hugging Face model: a folder with config.json, or ``owner/model``."""
    if base.exists() or (base.parent.exists() and base.parent != Path()):
        return (base / "config.json").is_file()
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base.as_posix()) is not None and base.suffix != ".pth"


def bundled_data(name: str) -> Path:
    """A data file that ships with the code."""
    return REPOSITORY / "dataset" / name


def metrics_path(out_dir: str | Path, run: str) -> Path:
    """``out/metrics/<run>.jsonl``; the loss picture lies beside it as ``.png``."""
    return Path(out_dir) / "metrics" / f"{run}.jsonl"


def checkpoints_dir(out_dir: str | Path, run: str) -> Path:
    """``out/checkpoints/<run>``, the folder of the states from which a run can be resumed."""
    return Path(out_dir) / "checkpoints" / run


def cache_dir(out_dir: str | Path) -> Path:
    """Tokenised data, safe to delete at any time."""
    return Path(out_dir) / "cache"
