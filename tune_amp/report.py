"""The report of a run: one HTML file with figures, made from its Parquet files alone and readable without a network.

plotly.js, 4.8 MB of JavaScript, is in the file: the report of years ago still opens. Nothing here imports torch or Ray.
"""

import os
from pathlib import Path

from tune_amp import __version__
from tune_amp.config import InputError
from tune_amp.files import write_atomically
from tune_amp.report_findings import (
    write_confirmed,
    write_importance,
    write_ledger,
    write_origin,
    write_parameters,
)
from tune_amp.report_page import Html, build_page, is_page, tag
from tune_amp.report_run import Run, load_run
from tune_amp.report_sections import write_curves, write_epochs, write_history, write_scales
from tune_amp.report_summary import name_subject, say_moment, write_summary
from tune_amp.run_files import REPORT_FILE


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Make the report of the run in ``folder``.

    Args:
        folder: a run's folder; only ``trials.parquet`` must be in it.
        output: the file to write, ``report.html`` in ``folder`` if None. An earlier report is replaced, nothing else.

    Returns:
        The file written.

    Raises:
        InputError: ``trials.parquet`` is missing, damaged, not ours or of another version; the file cannot be written,
            or is there and is no report.
    """
    run = load_run(Path(folder))
    path = run.folder / REPORT_FILE if output is None else Path(output)
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
    """The report as HTML."""
    return build_page(f"{name_subject(run)}: {run.provenance.run}", build_content(run))


def build_content(run: Run) -> list[Html]:
    """What a reader sees: the first screen and the sections."""
    head = tag(
        "header",
        tag("h1", name_subject(run)),
        tag("p", f"tune_amp, run {run.provenance.run}, started {say_moment(run.provenance.created)}", class_="run"),
        write_summary(run),
        _write_contents(),
    )
    return [
        head,
        write_history(run),
        write_epochs(run),
        write_scales(run),
        write_curves(run),
        write_importance(run),
        write_parameters(run),
        write_confirmed(run),
        write_ledger(run),
        write_origin(run, __version__),
    ]


CONTENTS = {
    "history": "history",
    "epochs": "early stopping",
    "scales": "loss scales",
    "curves": "validation",
    "importance": "importance",
    "parameters": "settings",
    "best": "fresh seeds",
    "time": "slot time",
    "origin": "origin",
}


def _write_contents() -> Html:
    links = (tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name in CONTENTS.items())
    return tag("nav", tag("ul", *links), aria_label="sections")
