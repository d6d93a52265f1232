"""The report of a run: one HTML file with figures, made from its Parquet files alone and readable without a network.

The file contains plotly.js, compressed to 1.8 MB, so that a report still opens years later. Nothing here imports torch
or Ray.
"""

import os
from pathlib import Path

from tune_amp import __version__
from tune_amp.report.page import is_page, render_page
from tune_amp.report.run import Run, load_run
from tune_amp.report.sections import SECTIONS, find_origin
from tune_amp.report.summary import build_summary, format_moment, name_subject
from tune_amp.results.files import write_atomically
from tune_amp.trial.config import InputError


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of the run in ``folder``.

    Args:
        folder: a run's folder; only ``trials.parquet`` is required.
        output: the file to write, ``report.html`` in ``folder`` if None. It replaces an earlier report, but no other
            file.

    Returns:
        The file written.

    Raises:
        InputError: ``trials.parquet`` is missing, damaged, not written by tune_amp or of another version; the file
            cannot be written, or exists and is not a report.
    """
    run = load_run(Path(folder))
    path = run.folder.report if output is None else Path(output)
    page = build_report(run).encode("utf-8", errors="replace")  # file names may hold surrogates
    try:
        if os.path.lexists(path) and not is_page(path):
            raise InputError(
                f"{path}: already exists and is no report of tune_amp: remove it, or name another --output"
            )
        write_atomically(path, lambda file: file.write(page))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def build_report(run: Run) -> str:
    """Return the report as HTML."""
    return render_page(
        subject=name_subject(run),
        run=run.provenance.run,
        started=format_moment(run.provenance.created),
        summary=build_summary(run),
        sections={anchor: (link, title, write(run)) for anchor, (link, title, write) in SECTIONS.items()},
        origin=find_origin(run, __version__),
    )
