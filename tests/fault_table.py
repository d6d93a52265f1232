"""Makes ``results/reference/faults.md`` out of what the fault tests measured.

    TUNE_AMP_FAULT_ROWS=rows.jsonl TUNE_AMP_KILLS=32 python -m pytest tests/faults
    python tests/fault_table.py rows.jsonl > results/reference/faults.md

Each row is what one test came to, or several of the same name together; a test that failed has none.
"""

import argparse
import collections
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HEAD = ("fault", "times", "outcome", "ended after", "back after", "reports before / in all", "trained again", "lost",
        "doubled", "ranking")  # fmt: skip

NOTES = """
*times*: how often it struck. *ended after*: seconds from the fault until the command had ended by itself, where it
did. *back after*: seconds from the command with `--resume` until trials ran again, Ray's own start included.
*reports*: epochs that trials reported before the fault, and over all parts of the run together. *trained again*:
those of them that repeat what lay behind the last checkpoint. *lost*, *doubled*: reported epochs that are not in
`epochs.parquet`, or twice. *ranking*: `best.parquet`, and every epoch of every trial, against an undisturbed run
(no mark where the fault itself ends a trial, or there is nothing to compare with). Medians where several runs were hit.
"""


def build_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, in the order in which faults come first."""
    places = {name: place for place, name in enumerate(dict.fromkeys(row["fault"] for row in rows))}
    grouped = itertools.groupby(sorted(rows, key=lambda row: places[row["fault"]]), key=lambda row: row["fault"])
    body = [_describe(list(of_fault)) for _, of_fault in grouped]
    lines = [HEAD, tuple("---" for _ in HEAD), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n" + NOTES + _describe_machine(rows)


def _describe(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    [outcome] = {row["outcome"] for row in rows}
    same = {row.get("ranking_equal") for row in rows}
    assert False not in same, "a test noted a ranking that it should have refused"
    before = _summarize(rows, "before", sum)
    return (
        rows[0]["fault"] + _list_phases(rows),
        str(sum(row.get("faults", 1) for row in rows)),
        outcome,
        _seconds(rows, "ended"),
        _seconds(rows, "resumed"),
        f"{before} / {sum(row['reports'] for row in rows)}" if before else f"{sum(row['reports'] for row in rows)}",
        *(str(sum(row[name] for row in rows)) for name in ("repeated", "lost", "doubled")),
        "equal" if same == {True} else "",
    )


def _describe_machine(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds are long where others use the machine too."""
    loads = [row["load"] for row in rows if "load" in row]
    if not loads:
        return ""
    cores = max(row["cores"] for row in rows if "cores" in row)
    usual, most = statistics.median(loads), max(loads)
    return f"Measured on {cores} cores with a load average of {usual:.0f} (the median; {most:.0f} at most).\n"


def _list_phases(rows: Sequence[dict[str, Any]]) -> str:
    """How often it struck in which phase of a run, where that is known."""
    struck: dict[str, int] = collections.Counter()
    for row in rows:
        struck.update(row.get("phases", {}))
    return " (" + ", ".join(f"{times} in {phase}" for phase, times in struck.items()) + ")" if struck else ""


def _seconds(rows: Iterable[dict[str, Any]], name: str) -> str:
    value = _summarize(rows, name, statistics.median)
    return "" if value is None else f"{value:.1f} s"


def _summarize(rows: Iterable[dict[str, Any]], name: str, how: Callable[[list[float]], float]) -> float | None:
    known = [row[name] for row in rows if row.get(name) is not None]
    return how(known) if known else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", type=Path, help="file that TUNE_AMP_FAULT_ROWS named")
    parser.add_argument("--note", help="last line: what must be known of the machine", default="")
    arguments = parser.parse_args()
    noted = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    print(build_table(noted) + (f"{arguments.note}\n" if arguments.note else ""), end="")  # noqa: T201
