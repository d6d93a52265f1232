"""The arguments of ``tune-amp search``."""

import argparse
from typing import Any

from tune_amp.config import DATASETS, MODELS, OBJECTIVES, SAMPLERS, SCHEDULERS
from tune_amp.console import OneLineParser, read_path, read_place
from tune_amp.options import DEFAULT_RESULTS_DIR, NONE, TRACKERS, SearchOptions

DEFAULT_SPACE = "mnist_amp"


CONFIRM_HELP = (
    "most fresh seeds to confirm the best on: the top k and the defaults are trained on 3; then the best of them and "
    "the defaults on the others, if these can show a gain; 0: none"
)


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

    add("space", f"YAML file, or a bundled space's name ({DEFAULT_SPACE})", nargs="?", type=read_place, metavar="SPACE")
    add("--dataset", f"{data}; auto is MNIST where it can be had, else scikit-learn's digits", default="auto")
    add("--data-dir", "folder of the data files, or TUNE_AMP_DATA", type=read_path, metavar="DIR")
    text = "thin the training classes to a long tail of X:1; validation and test stay as they are"
    add("--imbalance", text, type=float, default=1.0, metavar="X")
    add("--model", f"{', '.join(MODELS)} or MODULE:FUNCTION")
    add("--num-samples", "number of trials", type=int, metavar="N")
    add("--max-epochs", "epochs of a trial that is not stopped early", type=int, metavar="N")
    add(
        "--grace-period",
        "epochs before the scheduler can stop a trial; a diverged one ends at once",
        type=int,
        metavar="N",
    )
    add("--reduction-factor", "one trial in X passes a rung of ASHA or HyperBand", type=float, metavar="X")
    add("--objective", f"{', '.join(OBJECTIVES)}, or several joined by commas, beginning with accuracy or loss")
    chosen = {"default": "auto", "metavar": "NAME"}  # SearchOptions puts a name in its place
    add("--sampler", f"{', '.join(SAMPLERS)} or auto: tpe, for several objectives nsga2", **chosen)
    add("--scheduler", f"{', '.join(SCHEDULERS)} or auto: asha; none for several objectives, gp and nsga2", **chosen)
    add("--seed", "seed of the sampler and of every trial", type=int, metavar="N")
    add("--gpus-per-trial", "GPUs a trial: 0.25 lets four share one", type=_gpu_share, default="auto", metavar="auto|X")
    add("--cpus-per-trial", "CPU threads of a trial (1)", type=int, metavar="N")
    add("--max-concurrent", "largest number of trials at a time (as many as fit)", type=int, metavar="N")
    text = "time after which trials are interrupted; confirmation comes on top (no limit)"
    add("--time-budget", text, type=float, metavar="SECONDS")
    text = "time after which a trial is ended as failed, because it hangs (no limit)"
    add("--trial-time-limit", text, type=float, metavar="SECONDS")
    text = "stop the search where its first N trials all fail with the same error"
    add("--max-failures", text, type=int, metavar="N")
    add(
        "--top-k",
        "configurations in best.parquet; for several objectives it holds the Pareto set",
        type=int,
        metavar="N",
    )
    text = "start from what an earlier run found: its folder, its name in --results-dir, or its Parquet file"
    add("--warm-start", text, type=read_place, metavar="RUN")
    add("--confirm-seeds", CONFIRM_HELP, type=int, metavar="N")
    text = "resume a run that was cut off, with the arguments that it had: its folder, or its name in --results-dir"
    add("--resume", text, type=read_place, metavar="RUN")
    add("--name", "name of the run: letters, digits, _, . and - (space, date and time)", metavar="RUN")
    add("--results-dir", "where run folders are made", type=read_path, default=DEFAULT_RESULTS_DIR, metavar="DIR")
    text = f"report to {', '.join(TRACKERS)}, or several joined by commas, or none; their files lie in the run folder"
    add("--tracker", text, action="append", default=[], metavar="NAME")
    text = "join a Ray cluster: auto, host:port or ray://host:port; none starts a Ray here"
    add("--address", text, type=_unless_none, metavar="ADDR")
    text = "where a cluster's nodes keep checkpoints; none is the run folder"
    add("--storage-path", text, type=_storage_place, metavar="URL")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="print the path of best.parquet and nothing else")
    shown.add_argument("--json", action="store_true", help="print JSON lines")
    return parser


def _unless_none(text: str) -> str | None:
    return None if text == NONE else text


def _storage_place(text: str) -> str | None:
    if "://" not in text:
        read_place(text)  # to be refused, if it must be: with ray://, the home folder is the cluster's
    return _unless_none(text)


def _gpu_share(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number, got {text!r}") from None
