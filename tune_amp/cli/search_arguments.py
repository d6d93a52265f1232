"""The arguments of ``tune-amp search``."""

import argparse
import dataclasses
from typing import Any

from tune_amp.cli.console import OneLineParser, read_path, read_place
from tune_amp.search.options import DEFAULT_RESULTS_DIR, NONE, TRACKERS, SearchOptions, name_flag
from tune_amp.trial.config import DATASETS, value_type

DEFAULT_SPACE = "mnist_amp"

GROUPS = {
    "what is trained": ("dataset", "data_dir", "imbalance", "model", "task", "train"),
    "how much": ("num_samples", "max_epochs", "time_budget", "trial_time_limit", "max_failures"),
    "how it is searched": ("objective", "mode", "sampler", "scheduler", "grace_period", "reduction_factor", "seed"),
    "before and after": ("warm_start", "top_k", "confirm_seeds"),
    "hardware and cluster": ("gpus_per_trial", "mps", "cpus_per_trial", "max_concurrent", "address", "storage_path"),
    "the run and its output": ("name", "results_dir", "resume", "tracker", "dashboard", "quiet", "json"),
}
"""Headings of the help -> the flags below each, by their fields."""


def search_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of the arguments; its help names ``program``."""
    text = "Search for the settings under which mixed-precision training works best."
    parser = OneLineParser(program, text, usage="%(prog)s [SPACE] [flags]")
    text = f"YAML file, or a bundled space's name ({DEFAULT_SPACE})"
    parser.add_argument("space", help=text, nargs="?", type=read_place, metavar="SPACE")
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    group_of = {name: groups[title] for title, names in GROUPS.items() for name in names}

    def add(name: str, text: str, **settings: Any) -> None:
        unset = settings.get("default") in (None, [])
        group_of[name].add_argument(name_flag(name), help=text if unset else f"{text} (%(default)s)", **settings)

    text = (
        f"auto, {', '.join(DATASETS)} or MODULE:FUNCTION; auto is MNIST where it can be had, else scikit-learn's digits"
    )
    add("dataset", text, default="auto", metavar="NAME")
    add("data_dir", "folder of the data files, or TUNE_AMP_DATA", type=read_path, metavar="DIR")
    text = "thin the training classes to a long tail of X:1; validation and test stay as they are"
    add("imbalance", text, type=float, default=1.0, metavar="X")
    for field in dataclasses.fields(SearchOptions):
        about, kind = field.metadata, value_type(field.name, SearchOptions)
        add(
            field.name,
            about["help"] + (f" ({about['unset']})" if "unset" in about else ""),
            type=about.get("read", kind),
            default=field.default,
            metavar=about.get("metavar", {int: "N", float: "X", str: "NAME"}[kind]),
        )
    text = "start from what an earlier run found: its folder, its name in --results-dir, or its Parquet file"
    add("warm_start", text, type=read_place, metavar="RUN")
    text = "join a Ray cluster: auto or host:port; none starts a Ray here"
    add("address", text, type=_unless_none, metavar="ADDR")
    text = "where a cluster's nodes keep checkpoints; none is the run folder"
    add("storage_path", text, type=_storage_place, metavar="URL")
    add("name", "name of the run: letters, digits, _, . and - (space, date and time)", metavar="RUN")
    add("results_dir", "where run folders are made", type=read_path, default=DEFAULT_RESULTS_DIR, metavar="DIR")
    text = "resume a run that was cut off, with the arguments that it had: its folder, or its name in --results-dir"
    add("resume", text, type=read_place, metavar="RUN")
    text = f"report to {', '.join(TRACKERS)}, or several joined by commas, or none; their files lie in the run folder"
    add("tracker", text, action="append", default=[], metavar="NAME")
    text = "whether a Ray that starts here serves its dashboard"
    add("dashboard", text, choices=("on", "off"), default="on")
    shown = group_of["quiet"].add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="print the path of best.parquet and nothing else")
    shown.add_argument("--json", action="store_true", help="print JSON lines")
    return parser


def _unless_none(text: str) -> str | None:
    return None if text == NONE else text


def _storage_place(text: str) -> str | None:
    if "://" not in text:
        read_place(text)  # refuses a bad path
    return _unless_none(text)
