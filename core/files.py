"""Files that are either whole or absent, and the lock that tells whether somebody is at work."""

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO

from core.errors import UserError, reason_of

WINDOWS = os.name == "nt"  # where whatever is open can be neither deleted nor renamed
RACY_NS = 2_000_000_000  # file systems count time in steps of up to two seconds
YOUNG_SECONDS = 60  # ample time to lock a file that was just made
_ours: set[Path] = set()  # the temporary files that this process is writing


def try_lock(file: IO, *, where_unknown: bool = True) -> bool:
    """Lock a file that is open for writing; False if another process holds the lock.

    It lasts until this process closes the file or ends; forked processes do not hold it too. On a
    file system without locks the answer is ``where_unknown``.
    """
    try:
        if WINDOWS:
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return where_unknown
    return True


def atomic_write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write ``path`` through ``write(file)``: a crash leaves the old content or the new, no part.

    A temporary file in the same folder is written, fsynced and renamed over ``path``. Missing
    folders are made. Temporary files that killed writers of ``path`` left are deleted, those of
    live ones never. Raises ``UserError`` when the disk refuses.
    """
    path, outer = Path(path), sys.exc_info()[1]
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    _ours.add(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_dead(path)
        with temporary.open("xb") as file:
            try_lock(file)
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if WINDOWS:
                file.close()
            os.replace(temporary, path)
        fsync_folder(path.parent)
    except UserError:  # from ``write``, about another file
        raise
    except Exception as error:
        # torch.save hides the disk's error behind one of its own. An error that the caller is
        # handling has nothing to do with this file.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause is outer:
            raise
        way_out = "make room there or choose another folder"
        raise UserError(f"cannot write {path}: {cause.strerror or cause}; {way_out}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _ours.discard(temporary)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to write into; what is left in it at the end is deleted.

    Missing parents of ``path`` are made, and those that are still empty at the end are deleted,
    too. So whatever fails inside leaves nothing, and touches nothing that was there, but for the
    same folder of a killed process. Raises ``UserError`` when the disk refuses.
    """
    folder = path.with_name(f".{path.name}.unfinished")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
        folder.mkdir(parents=True)
        yield folder
    except UserError:
        raise
    except Exception as error:
        # Libraries written in Rust put the disk's refusal into errors of their own kinds.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or reason_of(error)
        way_out = "make room there or choose another folder"
        raise UserError(f"cannot write {path}: {reason}; {way_out}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # one that holds something, or is not there
            for parent in made:
                parent.rmdir()


def publish(places: Mapping[Path, Path]) -> None:
    """Move each file or folder to its place on the same disk, where nothing is: all, or none.

    Raises ``UserError`` if something is in a place, be it a link to nothing. A process that is
    killed between two moves leaves the first.
    """
    moved = []
    try:
        for written, path in places.items():
            if os.path.lexists(path):
                raise UserError(f"{path} exists; choose another place or delete it")
            written.rename(path)
            moved.append((path, written))
    except BaseException:
        for path, written in reversed(moved):
            path.rename(written)
        raise


def _delete_dead(path: Path) -> None:
    """Delete the temporary files of ``path`` that nobody is writing."""
    for left in set(path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}")) - _ours:
        with contextlib.suppress(OSError):  # on Windows an open file stays
            status = left.stat()
            if not status.st_size and time.time() - status.st_mtime < YOUNG_SECONDS:
                continue  # its writer may not have locked it yet
            with left.open("r+b") as file:
                dead = try_lock(file, where_unknown=False)
            if dead:
                left.unlink()


def sha256_file(path: Path, cache: Path | None = None) -> str:
    """Hex SHA-256 of a file's bytes.

    With a ``cache`` folder its ``sha256.json``, which may be deleted at any time, remembers it for
    as long as the file keeps its size and its times.
    """
    path = Path(path).resolve()
    memo = Path(cache) / "sha256.json" if cache else None
    stamp, entry = _stamp(path), read_object(memo).get(str(path)) if memo else None
    if isinstance(entry, list) and entry[:-1] == stamp:
        return entry[-1]
    digest, began = hashlib.sha256(), time.time_ns()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    # A file that has just changed may change again within one tick of its clock, and keep its
    # times: git's "racily clean" entries. Such a file is not remembered.
    if memo and _stamp(path) == stamp and began - max(stamp[1:]) > RACY_NS:
        known = read_object(memo) | {str(path): [*stamp, digest.hexdigest()]}
        with contextlib.suppress(UserError):
            atomic_write(memo, lambda file: file.write(json.dumps(known, indent=1).encode()))
    return digest.hexdigest()


def _stamp(path: Path) -> list[int]:
    """Size and times: writing changes at least one. On Unix nobody can set back the second time."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def read_object(path: Path) -> dict:
    """The JSON object in a file; an empty one where the file is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def fsync_folder(folder: Path) -> None:
    """Make renames in ``folder`` outlast a power cut, where the system can do that."""
    # Windows cannot open a folder, and some network file systems refuse to sync one.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
