"""One process at a time downloads an archive or decodes a folder."""

import contextlib
import os
import sys

from filelock import FileLock, Timeout

SILENT_SECONDS = 10


@contextlib.contextmanager
def writing(path):
    """A block in which one process at a time creates the file `path`; the others wait.

    If no lock can be made, the block runs unlocked: files are complete or absent anyway. A new
    directory that stays empty is removed.
    """
    new_directory = not path.parent.is_dir()
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with contextlib.suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=SILENT_SECONDS)
        except Timeout:
            print(f"waiting for another process, which holds {lock.lock_file}", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()
        if new_directory:
            with contextlib.suppress(OSError):
                path.parent.rmdir()
