"""The arguments of ``tune-amp search``."""

import argparse
from pathlib import Path
from typing import Any

from tune_amp.config import DATASETS, MODELS, OBJECTIVES, SAMPLERS, SCHEDULERS
from tune_amp.console import OneLineParser
from tune_amp.options import NONE, TRACKERS, SearchOptions

DEFAULT_SPACE = "mnist_amp"
DEFAULT_RESULTS_DIR = Path("results")


def search_parser(program: str) -> argparse.ArgumentParser:
    """Parses them; ``program`` is named in the help."""
    parser = OneLineParser(
        prog=program,
        description="Search for the settings under which mixed-precision training works best.",
        allow_abbrev=False,
    )
    default = SearchOptions()
    data = f"auto, {', '.join(DATASETS)} or MODULE:FUNCTION"

    def add(name: str, text: str, **settings: Any) -> None:
        field = name.removeprefix("--").replace("-", "_")
        settings.setdefault("default", getattr(default, field, None))
        shown = "" if settings["default"] in (None, []) else " (%(default)s)"
        parser.add_argument(name, help=text + shown, **settings)

    add("space", f"YAML file, or a bundled space's name ({DEFAULT_SPACE})", nargs="?", metavar="SPACE")
    add("--dataset", f"{data}; auto is MNIST where it can be had, else scikit-learn's digits", default="auto")
    add("--data-dir", "folder of the data files, or TUNE_AMP_DATA", type=Path, metavar="DIR")
    text = "thin the training classes to a long tail of X:1; validation and test stay as they are"
    add("--imbalance", text, type=float, default=1.0, metavar="X")
    add("--model", f"{', '.join(MODELS)} or MODULE:FUNCTION")
    add("--num-samples", "trials", type=int, metavar="N")
    add("--max-epochs", "full budget of a trial", type=int, metavar="N")
    add(
        "--grace-period",
        "epochs before the scheduler can stop a trial; a diverged one ends at once",
        type=int,
        metavar="N",
    )
    add("--reduction-factor", "one trial in X goes on from rung to rung", type=float, metavar="X")
    add("--objective", f"{', '.join(OBJECTIVES)}, or several joined by commas, beginning with accuracy or loss")
    chosen = {"default": "auto", "metavar": "NAME"}  # SearchOptions puts a name in its place
    add("--sampler", f"{', '.join(SAMPLERS)} or auto: tpe, for several objectives nsga2", **chosen)
    add("--scheduler", f"{', '.join(SCHEDULERS)} or auto: asha; none for several objectives, gp and nsga2", **chosen)
    add("--seed", "of the sampler and of every trial", type=int, metavar="N")
    add("--gpus-per-trial", "0.25 lets four share a GPU", type=_gpu_share, default="auto", metavar="auto|X")
    add("--cpus-per-trial", "CPU threads of a trial (1)", type=int, metavar="N")
    add("--max-concurrent", "most trials at a time (as many as fit)", type=int, metavar="N")
    add("--time-budget", "interrupt trials after so long; confirmation comes on top", type=float, metavar="SECONDS")
    text = "end a trial as failed that takes longer: it hangs (never)"
    add("--trial-time-limit", text, type=float, metavar="SECONDS")
    add(
        "--top-k",
        "configurations in best.parquet; for several objectives it holds the Pareto set",
        type=int,
        metavar="N",
    )
    text = "begin with what an earlier run found: its folder, its name in --results-dir, or its Parquet file"
    add("--warm-start", text, metavar="RUN")
    add("--confirm-seeds", "fresh seeds on which the top k are trained again; 0: none", type=int, metavar="N")
    text = "go on with a run that was cut off: its folder, or its name in --results-dir, as it was begun"
    add("--resume", text, metavar="RUN")
    add("--name", "name of the run (space, date and time)", metavar="RUN")
    add("--results-dir", "where run folders are made", type=Path, default=DEFAULT_RESULTS_DIR, metavar="DIR")
    text = f"tell {', '.join(TRACKERS)}, or several joined by commas, or none; kept in the run folder"
    add("--tracker", text, action="append", default=[], metavar="NAME")
    text = "join a Ray cluster: auto, host:port or ray://host:port; none starts a Ray here"
    add("--address", text, type=_unless_none, metavar="ADDR")
    text = "where a cluster's nodes keep checkpoints; none is the run folder"
    add("--storage-path", text, type=_unless_none, metavar="URL")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="print the path of best.parquet and nothing else")
    shown.add_argument("--json", action="store_true", help="print JSON lines")
    return parser


def _unless_none(text: str) -> str | None:
    return None if text == NONE else text


def _gpu_share(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number, got {text!r}") from None
