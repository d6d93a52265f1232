"""Measure tune_amp itself: ``python scripts/benchmark.py --help``.

``record`` trains random configurations to their full budget and keeps their learning curves; ``search-quality`` replays
searches over them; ``telemetry`` measures what watching a training costs. Their results lie in ``results/reference/``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tune_amp.config import DATASETS, InputError
from tune_amp.console import EXIT_DONE, OneLineParser, answer_bad_input, load_announced

REFERENCE = Path("results/reference")
WRITE_EVERY = 32  # curves: a recording takes hours, and what it has can be used


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code."""

    def run() -> int:
        parsed = _build_parser().parse_args(arguments)
        command = {"record": record, "search-quality": measure_search_quality, "telemetry": measure_telemetry_cost}
        return command[parsed.command](parsed)

    return answer_bad_input(run)


def record(arguments: argparse.Namespace) -> int:
    """Train random configurations of a space, each to its full budget."""
    from tune_amp.benchmarks.curves import describe_origin, record_curves, sample_configs, write_curves
    from tune_amp.space import load_space

    space = load_space(arguments.space)
    output = arguments.output or REFERENCE / f"curves-{Path(space.source).stem}.parquet"
    _make_folder(output.parent)
    dataset = load_announced(arguments.dataset, arguments.data_dir)
    shared = {"model": "simple_net", "dataset": dataset.name, "max_epochs": arguments.max_epochs, "seed": 0}
    configs = sample_configs(
        space, arguments.count, seed=arguments.seed, train_images=len(dataset.train), shared=shared
    )
    origin = describe_origin(space, dataset, seed=arguments.seed)
    curves = []
    for curve in record_curves(configs, dataset, arguments.workers):
        curves.append(curve)
        print(f"{len(curves)} of {len(configs)}: {curve[-1].val_accuracy:.2%}, {curve[-1].state}", flush=True)
        if len(curves) % WRITE_EVERY == 0 or len(curves) == len(configs):
            write_curves(output, configs[: len(curves)], curves, origin)
    print(f"saved {output}")
    return EXIT_DONE


def measure_search_quality(arguments: argparse.Namespace) -> int:
    """Replay searches over every recorded space."""
    from tune_amp.benchmarks.search_quality import measure_quality, render_quality, write_quality

    files = {path.stem.removeprefix("curves-"): path for path in sorted(arguments.curves.glob("curves-*.parquet"))}
    if not files:
        raise InputError(
            f"--curves: must hold curves-*.parquet, which the subcommand record writes: {arguments.curves}"
        )
    _make_folder(arguments.output)
    quality = measure_quality(files, seeds=arguments.seeds, workers=arguments.workers)
    text = render_quality(quality)
    write_quality(arguments.output / "search-quality.parquet", quality)
    (arguments.output / "search-quality.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return EXIT_DONE


def measure_telemetry_cost(arguments: argparse.Namespace) -> int:
    """Measure what telemetry and probe add to training."""
    from tune_amp.benchmarks.telemetry import measure_telemetry, render_telemetry

    _make_folder(arguments.output)
    text = render_telemetry(measure_telemetry(load_announced(arguments.dataset, arguments.data_dir)))
    (arguments.output / "telemetry.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return EXIT_DONE


def _build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="scripts/benchmark.py", description="Measure tune_amp itself.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    recording = commands.add_parser("record", help="train random configurations and keep their learning curves")
    recording.add_argument("space", metavar="SPACE", help="a search space: file or bundled name")
    recording.add_argument("--count", type=_positive, default=256, metavar="N", help="configurations (%(default)s)")
    recording.add_argument("--seed", type=_natural, default=1, metavar="N", help="they are drawn with (%(default)s)")
    recording.add_argument("--max-epochs", type=_positive, default=8, metavar="N", help="of each (%(default)s)")
    recording.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes (%(default)s)")
    recording.add_argument("--output", type=Path, metavar="FILE", help=f"({REFERENCE}/curves-SPACE.parquet)")
    _add_data(recording)

    quality = commands.add_parser("search-quality", help="replay searches over recorded curves")
    quality.add_argument("--curves", type=Path, default=REFERENCE, metavar="DIR", help="recorded ones (%(default)s)")
    quality.add_argument("--seeds", type=_positive, default=40, metavar="N", help="searches a program (%(default)s)")
    quality.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes (%(default)s)")
    quality.add_argument("--output", type=Path, default=REFERENCE, metavar="DIR", help="for the results (%(default)s)")

    telemetry = commands.add_parser("telemetry", help="what telemetry and probe cost of the training time")
    telemetry.add_argument("--output", type=Path, default=REFERENCE, metavar="DIR", help="for the table (%(default)s)")
    _add_data(telemetry)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=DATASETS, default="mnist", help="(%(default)s)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the data files, or TUNE_AMP_DATA")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:  # numpy's generators take no other
        raise argparse.ArgumentTypeError(f"must be between 0 and 2^32 - 1, got {number}")
    return number


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {folder} cannot be made ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
