"""A command, watched from outside: how long it took, and the memory of all its processes."""

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

MEMORY_SAMPLE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandCost:
    """What a command took."""

    started: float
    """``time.time()`` when it was started."""
    wall_seconds: float
    peak_memory_bytes: int | None


def run_measured(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> CommandCost:
    """Run a command to its end, its output in ``log``.

    Raises:
        RuntimeError: it failed.
    """
    with log.open("wb") as output:
        started, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(  # noqa: S603
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        with watched_memory(process.pid) as peak:
            code = process.wait()
        seconds = time.perf_counter() - clock
    if code != 0:
        raise RuntimeError(f"the command ended with exit code {code}: {' '.join(command)}\n{read_tail(log)}")
    return CommandCost(started=started, wall_seconds=seconds, peak_memory_bytes=max(peak, default=None))


def read_tail(log: Path) -> str:
    """The end of what a command said."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])


@contextlib.contextmanager
def watched_memory(pid: int) -> Iterator[list[int]]:
    """A list to which a thread adds the memory of ``pid`` and its descendants, for the length of a ``with`` block."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(MEMORY_SAMPLE_SECONDS):
            total = sum_memory(pid)
            if total is not None:
                seen.append(total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def sum_memory(root: int, proc: Path = Path("/proc")) -> int | None:
    """Resident memory of a process and its descendants, added up; None where there is no ``/proc``."""
    if not (proc / "self").exists():
        return None
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            # The program's name stands in brackets and may hold blanks and brackets: what follows it counts.
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            parents[int(folder.name)], pages[int(folder.name)] = int(fields[1]), int(fields[21])
    ours = {root}
    while True:
        children = {pid for pid, parent in parents.items() if parent in ours} - ours
        if not children:
            return sum(pages.get(pid, 0) for pid in ours) * os.sysconf("SC_PAGE_SIZE")
        ours |= children
