"""Creates a private folder of this process in a temporary folder, and removes those that killed processes left behind.

Users name folders as they like, so a name proves nothing. A folder is removed only if it holds the text that its owner
wrote when it created the folder, and if the owner's lock on that text is free.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HOME_PREFIX = "tune-amp-home-"
OWNER_FILE = "owner"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MOUNTS = Path("/proc/self/mountinfo")


@contextlib.contextmanager
def private_home(parent: Path) -> Iterator[Path]:
    """Create a folder in ``parent`` that no other user can enter, for the duration of a ``with`` block.

    If this process is killed, the next process of this user on this machine that does so removes the folder.
    """
    _remove_abandoned(parent)
    home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX, dir=parent))  # 0700 whatever the umask
    proof = _describe_home(home)
    folder = os.open(home, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # fails on NFS; elsewhere systemd-tmpfiles spares a locked folder
            fcntl.flock(folder, fcntl.LOCK_EX)
        with (home / OWNER_FILE).open("xb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            owner.write(proof)  # after the lock: if the text is there, the lock shows whether this process lives
            owner.flush()
            yield home
    finally:
        for _ in range(10):  # Ray's last processes may still write there as they end
            _remove(home, proof)
            if not home.exists():
                break
            time.sleep(0.1)
        os.close(folder)


def _describe_home(home: Path) -> bytes:
    """Return the text that an owner writes into its home. A copy or another machine would need a different text."""
    status = home.lstat()
    purpose = "tune_amp made this folder, and removes it after the process that did so has ended"
    return os.fsencode(f"{purpose}\n{home.resolve()}\n{status.st_dev}:{status.st_ino}\n{_read_boot_id()}\n")


def _read_boot_id() -> str:
    """Return an id of this machine since its boot: only here does a free lock prove that the owner is dead."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _remove_abandoned(parent: Path) -> None:
    """Remove the homes in ``parent`` whose owners, processes of this user on this machine, were killed."""
    for home in parent.glob(f"{HOME_PREFIX}*"):
        with contextlib.suppress(OSError):  # belongs to another user, or another process removed it in the meantime
            path = home / OWNER_FILE
            if not _is_ours(home, stat.S_IFDIR) or not _is_ours(path, stat.S_IFREG):
                continue
            with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "rb") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                proof = _describe_home(home)
                if owner.read(len(proof) + 1) == proof:
                    _remove(home, proof)


def _is_ours(path: Path, kind: int) -> bool:
    status = path.lstat()
    return stat.S_IFMT(status.st_mode) == kind and status.st_uid == os.getuid()


def _remove(home: Path, proof: bytes) -> None:
    """Remove as much as possible of the home to which ``proof`` belongs, the owner's file last.

    An interrupted removal leaves the proof for the next one. Links are not followed. A home with a mount below it
    stays, because the removal would empty the mounted file system.
    """
    with contextlib.suppress(OSError):
        if _describe_home(home) != proof or _is_mounted_below(home):
            return
        for entry in list(home.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != OWNER_FILE:
                entry.unlink()
        if [*home.iterdir()] in ([], [home / OWNER_FILE]):
            (home / OWNER_FILE).unlink(missing_ok=True)
            home.rmdir()


def _is_mounted_below(home: Path) -> bool:
    try:
        mounts = [line.split()[4] for line in _MOUNTS.read_bytes().splitlines()]
    except OSError:  # not Linux
        return False
    # The table writes a blank as \040.
    below = os.fsencode(home.resolve()).replace(b"\\", rb"\134").replace(b" ", rb"\040") + b"/"
    return any(mount.startswith(below) for mount in mounts)
