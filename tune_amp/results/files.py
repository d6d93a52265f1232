"""Writes files whole or not at all, and claims folders so that no other process's files are overwritten."""

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tune_amp.trial.config import InputError


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, replace: bool = True) -> None:
    """Write ``path`` whole or not at all; on return, the file is on the disk.

    The file has no name until it is complete, so that a killed process leaves nothing behind.

    Args:
        path: the file.
        write: called with the open file to write its content.
        replace: False: an existing file stays, and FileExistsError is raised.

    Raises:
        OSError: nothing was written; what was at ``path`` is unchanged.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with _open_unnamed(temporary) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if not temporary.exists():
                # Without src_dir_fd, Python would hard-link the symbolic link in /proc itself.
                descriptor = file.fileno()
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor, follow_symlinks=True)
        if not replace and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _open_unnamed(path: Path) -> BinaryIO:
    """Open a new file in the folder of ``path``: without a name, or as ``path`` if the file system requires a name."""
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:  # NFS, for example
        return path.open("xb")
    return os.fdopen(descriptor, "w+b")


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed_folder(folder: Path) -> Iterator[Path]:
    """Claim the folder of ``--output`` for the ``with`` block: see :func:`claim_folder`.

    Raises:
        InputError: it is a file or contains files, another process holds it, or it cannot be created.
    """
    with contextlib.ExitStack() as stack:
        try:
            claim_folder(folder, stack)
        except FileExistsError:
            raise InputError(f"--output: {folder} already exists and is no empty folder; choose another") from None
        except BlockingIOError:
            raise InputError(f"--output: {folder} is being written by another process; choose another") from None
        except OSError as error:
            raise InputError(f"--output: {folder} cannot be made ({error.strerror})") from error
        yield folder


def claim_folder(folder: Path, stack: contextlib.ExitStack) -> None:
    """Create ``folder``, which must be missing or empty, and hold a lock on it until ``stack`` is closed.

    If it is empty then, it is removed with the parents that were created for it; a folder that existed before stays. A
    killed process leaves at most an empty folder, which the same command can claim again.

    Raises:
        FileExistsError: it is a file or contains files.
        BlockingIOError: another process holds it.
        OSError: it cannot be created.
    """
    for place in reversed([folder, *folder.parents]):
        if not place.exists():
            with contextlib.suppress(FileExistsError):  # another process created it first, and owns it
                place.mkdir()
                stack.callback(_remove_empty, place)
    if not folder.is_dir():
        raise FileExistsError
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when this process ends, however it ends
    except BlockingIOError:
        raise
    except OSError:
        pass  # NFS cannot lock a folder: there, only files in the folder show another process
    if any(folder.iterdir()):
        raise FileExistsError


def check_free(*paths: Path) -> None:
    """Raise InputError if a file exists in a claimed folder before this process has written it."""
    for path in paths:
        if os.path.lexists(path):
            raise InputError(f"{path}: was put there by another program, and is left alone; choose another folder")


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
