"""Runs one benchmark: ``python -m benchmarks NAME ...``, from the root of a checkout.

``search_speed`` times whole searches beside the obvious program, ``loop`` the training loop, ``scale`` the driver,
``load`` what it bears; ``gpu`` does all that can be done on one GPU without Ray and Optuna. ``record`` trains random
configurations to their full budget and keeps their learning curves; ``search_quality`` replays searches over them;
``warm_start`` measures what a search gains from an earlier run, ``telemetry`` and ``own_scaler`` what watching a
training costs, ``extensions`` what the tutorial's extensions change. Results lie in ``results/reference/``.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.search_speed import speed, speed_table
from tune_amp.cli.console import EXIT_DONE, OneLineParser, answer_bad_input, load_announced, read_path
from tune_amp.trial.config import DATASETS, MODELS, InputError

REFERENCE = Path("results/reference")
EXIT_FAILED = 1
WRITE_EVERY = 32  # curves: a recording takes hours, and what it has can be used


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code."""

    def run() -> int:
        parsed = _build_parser().parse_args(arguments)
        return int(parsed.run(parsed))

    return answer_bad_input(run)


def time_searches(arguments: argparse.Namespace) -> int:
    """Time searches beside the obvious program, or find where their own time goes."""
    _make_folder(arguments.output)
    pairings = speed.list_pairings(
        arguments.data_dir,
        precisions=arguments.precisions,
        trials=arguments.trials,
        repeats=arguments.repeats,
        max_epochs=arguments.max_epochs,
        gpus_per_trial=arguments.gpus_per_trial,
    )
    if arguments.profile:
        from benchmarks.search_speed.profile import measure_profiles, render_profiles

        load = os.getloadavg()[0]
        text = render_profiles(measure_profiles(pairings, announce=_say), load)
        return _save_table(arguments.output / "search-profile.md", text)
    path = arguments.output / "search-speed.parquet"
    before = speed.load_measured(path) if arguments.go_on else ()
    result = speed.measure_speed(pairings, path=path, before=before, announce=_say)
    return _save_table(arguments.output / "search-speed.md", speed_table.render_speed(result))


def time_loop(arguments: argparse.Namespace) -> int:
    """Time the training loop of each model and precision."""
    from benchmarks.training.loop import measure_loop, render_loop, write_loop

    _make_folder(arguments.output)
    dataset = load_announced(arguments.dataset, arguments.data_dir)
    result = measure_loop(
        dataset, models=arguments.models, batch_sizes=arguments.batch_sizes, repeats=arguments.repeats, report=_tell
    )
    write_loop(arguments.output / "loop.parquet", result)
    return _save_table(arguments.output / "loop.md", render_loop(result))


def measure_driver(arguments: argparse.Namespace) -> int:
    """Measure what trials cost the driver."""
    from benchmarks.load.scale import measure_scale, render_scale, write_scale

    _make_folder(arguments.output)
    result = measure_scale(arguments.trials, repeats=arguments.repeats, report=_tell)
    write_scale(arguments.output / "scale.parquet", result)
    return _save_table(arguments.output / "scale.md", render_scale(result))


def measure_load_of_driver(arguments: argparse.Namespace) -> int:
    """Run searches of many trials, of many at a time and of many to resume."""
    from benchmarks.load.load import PLANS, measure_load
    from benchmarks.load.load_table import render_load, write_load

    _make_folder(arguments.output)
    result = measure_load([PLANS[part] for part in arguments.parts], report=_tell)
    write_load(arguments.output / "load.parquet", result)
    _save_table(arguments.output / "load.md", render_load(result))
    return EXIT_DONE if result.nothing_lost else EXIT_FAILED


def measure_one_gpu(arguments: argparse.Namespace) -> int:
    """Run the whole GPU suite."""
    import torch

    from benchmarks.training.gpu import (
        GpuResult,
        make_images,
        measure_gpu,
        name_folder,
        render_gpu,
        write_gpu,
    )
    from tune_amp.training.data import load_dataset

    if not torch.cuda.is_available():
        raise InputError("gpu: needs a CUDA device, and torch sees none")
    device = torch.device("cuda")
    folder = arguments.output / name_folder(device)
    _make_folder(folder)
    dataset = make_images() if arguments.data_dir is None else load_dataset("mnist", arguments.data_dir)

    def keep(result: GpuResult) -> None:
        """Written after every part: a later one may hang, or the machine be taken away."""
        write_gpu(folder / "gpu.parquet", result)
        (folder / "gpu.md").write_text(render_gpu(result), encoding="utf-8")

    result = measure_gpu(
        dataset,
        folder,
        device=device,
        seconds=arguments.seconds,
        announce=_say,
        keep=keep,
    )
    print(render_gpu(result), end="")
    return EXIT_FAILED if result.failed else EXIT_DONE


def record(arguments: argparse.Namespace) -> int:
    """Train random configurations of a space, each to its full budget."""
    from benchmarks.quality.curves import describe_origin, record_curves, sample_configs, write_curves
    from tune_amp.space.space import load_space

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
    from benchmarks.quality.search_quality import measure_quality, render_quality, write_quality

    files = {path.stem.removeprefix("curves-"): path for path in sorted(arguments.curves.glob("curves-*.parquet"))}
    if not files:
        raise InputError(
            f"--curves: must hold curves-*.parquet, which the subcommand record writes: {arguments.curves}"
        )
    _make_folder(arguments.output)
    quality = measure_quality(files, seeds=arguments.seeds, workers=arguments.workers)
    text = render_quality(quality)
    write_quality(arguments.output / "search-quality.parquet", quality)
    return _save_table(arguments.output / "search-quality.md", text)


def measure_warm_searches(arguments: argparse.Namespace) -> int:
    """Search from nothing and from files of earlier runs."""
    from benchmarks.quality.warm_start import TOP_K, measure_warm_start, render_warm_start, write_warm_start
    from tune_amp.search.options import SearchOptions

    curves = {path.stem.removeprefix("curves-"): path for path in sorted(arguments.curves.glob("curves-*.parquet"))}
    options = SearchOptions(num_samples=arguments.num_samples, max_epochs=arguments.max_epochs, top_k=TOP_K)
    _make_folder(arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        result = measure_warm_start(
            load_announced(arguments.dataset, arguments.data_dir) if arguments.seeds else None,
            load_announced("digits", None),
            options,
            folder=Path(folder),
            seeds=arguments.seeds,
            curves=curves,
            replay_seeds=arguments.replay_seeds,
            report=_tell,
        )
    write_warm_start(arguments.output / "warm-start.parquet", result)
    return _save_table(arguments.output / "warm-start.md", render_warm_start(result))


def measure_telemetry_cost(arguments: argparse.Namespace) -> int:
    """Measure what telemetry and probe add to training."""
    from benchmarks.training.telemetry import measure_telemetry, render_telemetry

    _make_folder(arguments.output)
    text = render_telemetry(measure_telemetry(load_announced(arguments.dataset, arguments.data_dir)))
    return _save_table(arguments.output / "telemetry.md", text)


def measure_own_scaler(arguments: argparse.Namespace) -> int:
    """Measure what the telemetry of a user's own loop adds to a step."""
    import torch

    from benchmarks.training.own_scaler import measure_overhead, render_overhead

    _make_folder(arguments.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = render_overhead(measure_overhead(device), device)
    return _save_table(arguments.output / "own-scaler.md", text)


def measure_effects(arguments: argparse.Namespace) -> int:
    """Measure what each of the tutorial's extensions changes."""
    from benchmarks.training.extensions import measure_extensions, render_extensions, write_extensions

    _make_folder(arguments.output)
    dataset = load_announced(arguments.dataset, arguments.data_dir)
    result = measure_extensions(dataset, seeds=arguments.seeds, announce=_say)
    write_extensions(arguments.output / "extensions.parquet", result)
    return _save_table(arguments.output / "extensions.md", render_extensions(result))


def _build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser("python -m benchmarks", "Measure tune_amp itself.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")

    _add_search(commands)

    looping = commands.add_parser("loop", help="the training loop, beside the tutorial's and the machine's floor")
    looping.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    looping.add_argument("--batch-sizes", nargs="+", type=_positive, default=(64, 512, 4096), metavar="N")
    looping.add_argument("--repeats", type=_positive, default=3, metavar="N", help="turns of each (%(default)s)")
    _add_data(looping)
    _add_output(looping, time_loop)

    scaling = commands.add_parser("scale", help="time and memory of the driver as trials grow in number")
    scaling.add_argument("--trials", nargs="+", type=_positive, default=(100, 500, 2000), metavar="N")
    scaling.add_argument(
        "--repeats",
        type=_positive,
        default=3,
        metavar="N",
        help="of each search, where they take under 6 minutes (%(default)s)",
    )
    _add_output(scaling, measure_driver)

    loading = commands.add_parser(
        "load", help="2,000 trials killed halfway, 64 at a time, 10,000 of a second, as many resumed"
    )
    parts = ("trials", "slots", "rate", "resume")
    loading.add_argument("--parts", nargs="+", choices=parts, default=parts)
    _add_output(loading, measure_load_of_driver)

    whole = commands.add_parser("gpu", help="all that one GPU can tell, in nine minutes, without Ray and Optuna")
    whole.add_argument("--data-dir", type=read_path, metavar="DIR", help="MNIST's four files (images made up here)")
    whole.add_argument("--seconds", type=float, default=500.0, metavar="X", help="for the suite (%(default)s)")
    _add_output(whole, measure_one_gpu)

    _add_replays(commands)
    _add_warm_start(commands)

    telemetry = commands.add_parser("telemetry", help="what telemetry and probe cost of the training time")
    _add_data(telemetry)
    _add_output(telemetry, measure_telemetry_cost)

    own_scaler = commands.add_parser("own_scaler", help="what telemetry adds to a step of a user's own loop")
    _add_output(own_scaler, measure_own_scaler)

    extensions = commands.add_parser("extensions", help="class weights, curricula, scaling, a static scale: on and off")
    extensions.add_argument("--seeds", type=_several, default=10, metavar="N", help="of each side (%(default)s)")
    _add_data(extensions)
    _add_output(extensions, measure_effects)
    return parser


def _add_search(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    searching = commands.add_parser("search_speed", help="whole searches beside the obvious program (hours)")
    searching.add_argument("--data-dir", type=read_path, required=True, metavar="DIR", help="MNIST's four files")
    searching.add_argument("--precisions", nargs="+", choices=speed.PRECISIONS, default=speed.PRECISIONS)
    searching.add_argument("--trials", nargs="+", type=_positive, default=(16, 64), metavar="N", help="(16 and 64)")
    searching.add_argument("--repeats", type=_positive, default=3, metavar="N", help="pairs of each (%(default)s)")
    searching.add_argument("--max-epochs", type=_positive, default=8, metavar="N", help="of a trial (%(default)s)")
    searching.add_argument("--gpus-per-trial", type=float, default=0.0, metavar="X", help="(%(default)s: the CPU)")
    searching.add_argument(
        "--go-on", action="store_true", help="keep what was measured here before, other settings too"
    )
    searching.add_argument("--profile", action="store_true", help="instead, where the time of our searches goes")
    _add_output(searching, time_searches)


def _add_replays(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    recording = commands.add_parser("record", help="train random configurations and keep their learning curves")
    recording.set_defaults(run=record)
    recording.add_argument("space", metavar="SPACE", help="a search space: file or bundled name")
    recording.add_argument("--count", type=_positive, default=256, metavar="N", help="configurations (%(default)s)")
    recording.add_argument("--seed", type=_natural, default=1, metavar="N", help="they are drawn with (%(default)s)")
    recording.add_argument("--max-epochs", type=_positive, default=8, metavar="N", help="of each (%(default)s)")
    recording.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes (%(default)s)")
    recording.add_argument("--output", type=read_path, metavar="FILE", help=f"({REFERENCE}/curves-SPACE.parquet)")
    _add_data(recording)

    quality = commands.add_parser("search_quality", help="replay searches over recorded curves")
    quality.add_argument(
        "--curves", type=read_path, default=REFERENCE, metavar="DIR", help="recorded ones (%(default)s)"
    )
    quality.add_argument("--seeds", type=_positive, default=40, metavar="N", help="searches a program (%(default)s)")
    quality.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes (%(default)s)")
    _add_output(quality, measure_search_quality)


def _add_warm_start(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    warm = commands.add_parser("warm_start", help="searches from files of earlier runs, beside cold ones")
    warm.add_argument("--seeds", type=_natural, default=8, metavar="N", help="of trained searches (%(default)s)")
    warm.add_argument("--num-samples", type=_positive, default=12, metavar="N", help="trials of each (%(default)s)")
    warm.add_argument("--max-epochs", type=_positive, default=4, metavar="N", help="of a trial (%(default)s)")
    warm.add_argument("--curves", type=read_path, default=REFERENCE, metavar="DIR", help="recorded ones (%(default)s)")
    warm.add_argument("--replay-seeds", type=_natural, default=40, metavar="N", help="over each (%(default)s)")
    _add_data(warm)
    _add_output(warm, measure_warm_searches)


def _add_output(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument(
        "--output", type=read_path, default=REFERENCE, metavar="DIR", help="for the results (%(default)s)"
    )
    parser.set_defaults(run=run)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=DATASETS, default="mnist", help="(%(default)s)")
    parser.add_argument("--data-dir", type=read_path, metavar="DIR", help="folder of the data files, or TUNE_AMP_DATA")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _several(text: str) -> int:
    number = int(text)
    if number < 2:  # one tells nothing of how far seeds differ
        raise argparse.ArgumentTypeError(f"must be at least 2, got {number}")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:  # numpy's generators take no other
        raise argparse.ArgumentTypeError(f"must be between 0 and 2^32 - 1, got {number}")
    return number


def _say(line: str) -> None:
    print(line, flush=True)


def _tell(row: object) -> None:
    """One line for each row as it comes: a long measurement should be seen to move."""
    print(", ".join(f"{name} {value}" for name, value in vars(row).items() if value not in (None, "")), flush=True)


def _save_table(path: Path, text: str) -> int:
    path.write_text(text, encoding="utf-8")
    print(text, end="")
    return EXIT_DONE


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {folder} cannot be made ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
