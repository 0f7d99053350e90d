"""Files of measured figures: where and when they were measured."""

import hashlib
import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from core.errors import UserError
from core.files import atomic_write
from core.paths import bundled_data


def read_results(path: Path | None) -> dict:
    """The figures in a results file, to be gone on with; {} where there is none.

    Raises ``UserError`` where it is damaged: nothing measured is written over unread.
    """
    if path is None or not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore or remove it") from error


def write_results(path: Path | None, figures: dict) -> None:
    """Write ``figures`` to ``path``; None writes nothing."""
    if path is not None:
        text = json.dumps(figures, ensure_ascii=False, indent=1) + "\n"
        atomic_write(path, lambda file: file.write(text.encode()))


def measured_on(packages: tuple[str, ...]) -> dict:
    """The entries ``date``, ``machine``, ``versions`` (Python's and the named packages') and
    ``bundled_data`` of a results file.
    """
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {"system": platform.system(), "cpu": cpu_model(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "bundled_data": data_version(),
    }


def data_version() -> str:
    """The first digits of a SHA-256 over the names and contents of the bundled data files."""
    folder, found = bundled_data(""), hashlib.sha256()
    for path in sorted(folder.rglob("*.jsonl")):
        if path.parent.name != "texts":  # what the others are composed from
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def cpu_model() -> str:
    """The processor's name where the system tells it, else its architecture."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
