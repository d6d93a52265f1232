"""Runs a search as the command does, and writes when each of its parts began and ended; ``profile`` runs this.

``python -m benchmarks.search_speed.profiled SPANS.json [arguments of the search]``. The functions of ``WATCHED`` are
wrapped once their module has been imported, so that no import comes earlier than in the command.
"""

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WATCHED: Mapping[str, str] = {
    "data and checks": "tune_amp.cli.search._load_checked",
    "search with Ray": "tune_amp.cli.search.search_with_ray",
    "Ray's start": "tune_amp.cluster.ray_patches.init_ray",
    "run of the search": "tune_amp.search.run.run_search",
    "trials": "tune_amp.search.run._run_trials",
    "conclusion": "tune_amp.search.run._conclude",
    "confirmation": "tune_amp.search.run._confirm",
    "report": "tune_amp.cli.search._write_report",
    "last lines": "tune_amp.cli.search.print_end",
}
"""Part of a search -> the function that is it."""
COMMAND, WHOLE = "command", "whole"
"""The program from here on, and the command without its imports."""
BEGUN = time.time()

Span = dict[str, float]


def watch(call: Callable[..., Any], span: Span, then: Callable[[], object]) -> Callable[..., Any]:
    """Return ``call``, which notes in ``span`` its begin and end since the epoch and the process's CPU seconds."""

    @functools.wraps(call)
    def watched(*arguments: Any, **options: Any) -> Any:
        span["began"], before = time.time(), time.process_time()
        try:
            return call(*arguments, **options)
        finally:
            span["ended"], span["cpu"] = time.time(), time.process_time() - before
            then()

    return watched


def watch_loaded(spans: dict[str, Span]) -> None:
    """Wrap the functions of ``WATCHED`` whose modules have been imported and that are not wrapped yet."""
    for part, place in WATCHED.items():
        name, _, function = place.rpartition(".")
        if part not in spans and hasattr(sys.modules.get(name), function):
            spans[part] = {}
            call = getattr(sys.modules[name], function)
            # The search itself is imported by a part that is watched.
            setattr(sys.modules[name], function, watch(call, spans[part], lambda: watch_loaded(spans)))


def main(arguments: Sequence[str]) -> int:
    """Run the search; write the spans whatever becomes of it. Return its exit code."""
    path, *command = arguments
    spans: dict[str, Span] = {}
    importlib.import_module("tune_amp.cluster.ray_patches")
    from tune_amp.cli.search import search_command

    watch_loaded(spans)
    whole: Span = {}
    try:
        return int(watch(search_command, whole, lambda: None)(command))
    finally:
        ended = {"began": BEGUN, "ended": time.time(), "cpu": time.process_time()}
        Path(path).write_text(json.dumps({**spans, WHOLE: whole, COMMAND: ended}), encoding="utf-8")


if __name__ == "__main__":
    from tune_amp.cli.console import leave

    leave(main(sys.argv[1:]))
