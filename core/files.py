"""Files that are either whole or absent."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from core.errors import UserError

RACY_NS = 2_000_000_000  # file systems count time in steps of up to two seconds


def atomic_write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write ``path`` through ``write(file)`` so that a crash leaves the old content or the new, never a part.

    A temporary file in the same folder is written, fsynced and renamed over ``path``; then the folder is fsynced
    where the system allows it. Missing folders are made. Raises ``UserError`` when the disk refuses.
    """
    path = Path(path)
    temporary, outer = None, sys.exc_info()[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # Temporary files are private (0600); the result gets what a plain open() would have given.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        fsync_folder(path.parent)
    except Exception as error:
        # torch.save hides the disk's error behind one of its own; what the caller is handling is another story.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause is outer:
            raise
        reason = cause.strerror or cause
        raise UserError(f"cannot write {path}: {reason}; make room there or choose another folder") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sha256_file(path: Path, cache: Path | None = None) -> str:
    """Hex SHA-256 of a file's bytes.

    With a ``cache`` folder it is remembered there, in ``sha256.json``, for as long as the file keeps its size and its
    times. That file may be deleted at any time; one that cannot be read or written only costs the time to hash.
    """
    path = Path(path).resolve()
    memo = Path(cache) / "sha256.json" if cache else None
    stamp, known = _stamp(path), _read_memo(memo)
    entry = known.get(str(path))
    if isinstance(entry, list) and entry[:-1] == stamp:
        return entry[-1]
    digest, began = hashlib.sha256(), time.time_ns()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    # A file that has just changed may change again within one tick of its clock, and keep its times: git's "racily
    # clean" entries. Such a file is not remembered.
    if memo and _stamp(path) == stamp and began - max(stamp[1:]) > RACY_NS:
        known = _read_memo(memo) | {str(path): [*stamp, digest.hexdigest()]}
        with contextlib.suppress(UserError):
            atomic_write(memo, lambda file: file.write(json.dumps(known, indent=1).encode()))
    return digest.hexdigest()


def _stamp(path: Path) -> list[int]:
    """What changes when a file is written: size, and on Unix the second time too if the first was set back."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read_memo(memo: Path | None) -> dict:
    try:
        known = json.loads(memo.read_text(encoding="utf-8")) if memo else {}
    except (OSError, ValueError):
        known = {}
    return known if isinstance(known, dict) else {}


def _umask() -> int:
    current = os.umask(0)  # it can only be read by setting it
    os.umask(current)
    return current


def fsync_folder(folder: Path) -> None:
    """Make renames in ``folder`` outlast a power cut, where the system can do that."""
    # Windows cannot open a folder, and some network file systems refuse to sync one: the rename itself has happened.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
