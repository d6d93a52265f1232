"""Files and folders that a command writes: whole or not at all, and never in the place of somebody else's."""

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
    """Let ``write`` fill ``path`` whole or not at all; on return it is on the disk.

    The file has no name until it is complete, so that a killed process leaves nothing behind.

    Args:
        path: the file.
        write: is called with the open file.
        replace: False: a file that is there stays, and FileExistsError is raised.

    Raises:
        OSError: nothing was written; what was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _open_unnamed(temporary) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if not temporary.exists():
                # Without a descriptor of a folder, Python would link to the link.
                descriptor = file.fileno()
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor, follow_symlinks=True)
        if not replace and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _open_unnamed(path: Path) -> BinaryIO:
    """Open a new file in the folder of ``path``: without a name, or with that one where the file system needs one."""
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
        InputError: it is a file or holds files, another process has it, or it cannot be made.
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
    """Make ``folder``, which must not exist or be empty, and keep it ours until ``stack`` is closed.

    Left empty, it is removed then, with the parents that were made for it; a folder that was there before stays. A
    killed process leaves an empty folder at most, which the same command takes again.

    Raises:
        FileExistsError: it is a file or holds files.
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """
    for place in reversed([folder, *folder.parents]):
        if not place.exists():
            with contextlib.suppress(FileExistsError):  # another process was faster, and it is that one's
                place.mkdir()
                stack.callback(_remove_empty, place)
    if not folder.is_dir():
        raise FileExistsError
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however that ends
    except BlockingIOError:
        raise
    except OSError:
        pass  # NFS locks no folder: there, two at once are told apart by their files
    if any(folder.iterdir()):
        raise FileExistsError


def check_free(folder: Path, *names: str) -> None:
    """Raise InputError where one of ``names`` is in a folder of ours before we have written it."""
    for path in (folder / name for name in names):
        if os.path.lexists(path):
            raise InputError(f"{path}: was put there by another program, and is left alone; choose another folder")


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
