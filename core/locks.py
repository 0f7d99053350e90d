"""A lock on a file. The system drops it when the process ends, however it ends: a crash leaves
nothing to clear away.

Standard library only, and every line parses on any Python 3, as in core/environment.py, which needs
it.
"""

import os


def try_lock(file):
    """Lock a file that is open for writing, until it is closed; False if another process holds the
    lock.

    A process forked meanwhile does not hold it too. Where the file system knows no locks, everyone
    gets one.
    """
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True
