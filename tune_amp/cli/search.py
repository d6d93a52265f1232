"""The command ``tune-amp search``, which ``scripts/search.py`` runs too: arguments, calls and printing."""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import os
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, TypeVar

from tune_amp.cli.console import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_NO_RESULT,
    answer_bad_input,
    check_same_data,
    complain,
    ignoring_closed_pipe,
    is_screen,
    load_announced,
    open_console,
    say,
    show_cursor,
)
from tune_amp.cli.search_arguments import DEFAULT_SPACE, search_parser
from tune_amp.cli.search_output import (
    choose_observer,
    print_dashboard,
    print_end,
    print_exposure,
    print_json_dashboard,
    print_json_end,
    print_json_start,
    print_start,
)
from tune_amp.cli.search_request import SearchRequest, open_request
from tune_amp.cluster.cpus import count_cpus
from tune_amp.cluster.interrupt import StopRequest, stopping_on_signals
from tune_amp.results.journal import read_journal
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.options import (
    DEFAULT_RESULTS_DIR,
    SearchOptions,
    name_path,
    naming_flags,
)
from tune_amp.trial.collection import importing
from tune_amp.trial.config import InputError, is_function_name
from tune_amp.trial.consent import list_own_code, list_provided, load_function
from tune_amp.trial.text import describe_error, hide_credentials, printable

if TYPE_CHECKING:
    from rich.console import Console

    from tune_amp.cluster.session import RaySession
    from tune_amp.search.run import SearchResult
    from tune_amp.space.space import SearchSpace
    from tune_amp.training.data import Dataset

_T = TypeVar("_T")


def search_command(arguments: Sequence[str] | None = None, program: str = "scripts/search.py") -> int:
    """Run a search and print its result. Return the exit code."""
    begun = time.monotonic()
    command = sys.argv[1:] if arguments is None else list(arguments)
    return answer_bad_input(lambda: _search(command, program, begun))


def _search(command: Sequence[str], program: str, begun: float) -> int:
    parser = search_parser(program)
    arguments = parser.parse_args(command)
    console = open_console(quiet=arguments.quiet or arguments.json)
    if is_screen(console):  # what follows takes seconds
        say(console, "starting   loading Optuna, Ray and PyTorch ...", style="dim")

    def load() -> "tuple[SearchSpace, str]":
        from tune_amp.space.space import load_space

        name = arguments.space or DEFAULT_SPACE
        return load_space(name), name

    with open_request(parser, command, arguments, load, (program, *command), begun) as request:
        return _run(request)


def _run(request: SearchRequest) -> int:
    """Search, print the result, and print how to resume if the search was cut off. Return the exit code."""
    from tune_amp.cluster.session import StartError

    arguments, stdout = request.arguments, sys.stdout

    def leave() -> None:
        try:
            _print_cut_off(f"{stop.reason}; left at once", request)
        finally:
            show_cursor()
            os._exit(EXIT_INTERRUPTED)  # Ray's processes end with this one

    stop = StopRequest(leave)
    # Programs read standard output, so it holds only this command's lines. Ray and a user's own code print there too.
    pure = contextlib.redirect_stdout(sys.stderr) if arguments.quiet or arguments.json else contextlib.nullcontext()
    try:
        with pure, stopping_on_signals(stop):
            result = search_with_ray(request, stop, stdout)
    except StartError as error:  # nothing began that could be resumed: the same command can be run again
        complain(f"error: {error}")
        return EXIT_NO_RESULT
    except (OSError, KeyboardInterrupt) as error:  # a full disk, most often, or Ctrl-C
        reason = describe_error(error) if isinstance(error, OSError) else stop.reason or "interrupted"
        return _print_cut_off(reason, request)
    except SystemExit as error:
        if error.code != signal.SIGTERM:  # raised by Ray's own SIGTERM handler while it starts
            raise
        return _print_cut_off("SIGTERM", request)
    except Exception as error:  # a bug here or in Ray: its traceback follows, but the run is not lost
        if not isinstance(error, InputError):
            code = _print_cut_off(describe_error(error), request)
            if _is_gone(request.folder):
                return code
        raise
    with ignoring_closed_pipe():
        if arguments.quiet and result.ranked:
            print(result.best_path)  # noqa: T201
        if arguments.json:
            print_json_end(stdout, result, _resume_command(request))
    if result.is_cut_off:
        code = _print_cut_off(result.reason or stop.reason or "interrupted", request)
        return EXIT_NO_RESULT if result.failing else code
    return EXIT_DONE if result.ranked else EXIT_NO_RESULT


def _print_cut_off(reason: str, request: SearchRequest) -> int:
    """Print what cut a run off, and how to resume it. Return the exit code."""
    folder = request.folder
    if _is_gone(folder):
        text = f"{folder} was removed or moved while the search ran, and cannot be resumed there ({reason})"
        complain(f"error: {text}")
        return EXIT_NO_RESULT
    complain(f"cut off  {hide_credentials(reason)}")
    if _is_resumable(request):
        complain(f"resume   {printable(_resume_command(request))}")
    return EXIT_INTERRUPTED


def _is_gone(folder: Path) -> bool:
    """Return whether a run folder was removed or moved. Ray and this process may have recreated parts of it."""
    return not folder.exists() or (any(folder.iterdir()) and not RunFolder(folder).journal.exists())


def _is_resumable(request: SearchRequest) -> bool:
    """Return whether the run can be resumed. A warm start is recorded with the first trial, so it needs one."""
    path = RunFolder(request.folder).journal
    if not path.exists() or path.stat().st_size == 0:
        return False
    return request.donor is None or any(event["event"] == "trial" for event in read_journal(path))


def search_with_ray(request: SearchRequest, stop: StopRequest, stdout: IO[str]) -> "SearchResult":
    """Start Ray, search as requested, write the report and print the result.

    Raises:
        StartError: Ray could not be started.
        InputError: data, space, model and options do not fit together.
    """
    from tune_amp.cluster.session import ray_session, resolve_address

    arguments, folder, space = request.arguments, request.folder, request.space
    options, history = request.options, request.history
    if arguments.address is not None:  # a bad address is refused before data are loaded
        resolve_address(arguments.address)
    console = open_console(quiet=arguments.quiet or arguments.json)
    modules = _user_modules(arguments.task or arguments.model)
    gpus = _count_usable_gpus()
    # Ray's start is mostly waiting for its processes, and takes as long as the data and the imports. Side by side, they
    # bring the first trial forward by 2 s. A user's own code runs in the main thread, as it may expect.
    has_own_code = bool(list_own_code(vars(arguments)))
    find_checked = _call(functools.partial(_load_checked, request), in_background=not has_own_code)
    with ray_session(
        arguments.address,
        run=folder.name,
        modules=modules,
        num_gpus=gpus,
        preload=("tune_amp.cluster.preload",),
        workers=_count_first_workers(options, gpus),
        mps=options.mps if options.may_share_gpus else "off",
        announce=lambda text: say(open_console(stderr=True), f"NOTE: {text}", style="bold yellow"),
    ) as session:
        stop.reinstall_handlers()  # again: Ray has installed a SIGTERM handler that ends at once
        print_exposure(session)
        dataset, unfit = find_checked()
        from tune_amp.cli.resume import remember
        from tune_amp.monitor.trackers import build_trackers
        from tune_amp.search.plan import SearchPlan, adapt_donor, plan_resources
        from tune_amp.search.run import run_search

        plan = SearchPlan(
            space=space,
            dataset=dataset,
            options=options,
            folder=folder,
            resources=plan_resources(
                options, space, dataset, announce=lambda text: say(console, f"resources  {text}", style="dim")
            ),
            unfit=unfit,
            command=tuple(map(hide_credentials, request.command)),
            arguments=remember(arguments),
            storage_path=arguments.storage_path,
            warm_start=None if request.donor is None else adapt_donor(request.donor, space, dataset, options),
            history=history,
            begun=request.begun,
        )
        with ignoring_closed_pipe():
            print_start(console, plan, session, request.notes, arguments.tracker)
            if arguments.json:
                print_json_start(stdout, plan, session)
        show_dashboard = functools.partial(_show_dashboard, console, stdout if arguments.json else None, session)
        watching = session.dashboard(show_dashboard, wanted=arguments.dashboard == "on")
        with choose_observer(arguments, console, stdout) as observer, watching:
            result = run_search(
                plan,
                observer,
                stop=stop,
                trackers=build_trackers(arguments.tracker, folder, past=history.last_epochs if history else {}),
                announce=lambda line: say(console, f"note       {line}", style="yellow"),
            )
        _write_report(result.folder)
        with ignoring_closed_pipe():  # before the session closes: Ray takes another second to end
            print_end(console, result, _reuse_command(arguments, result.best_path, request.command[0]))
        stop.is_watched = True  # an interrupt would leave Ray's files behind, and a traceback of Ray's
    return result


def _show_dashboard(console: "Console", stdout: IO[str] | None, before: "RaySession", session: "RaySession") -> None:
    """Print where Ray's dashboard is; as JSON if ``stdout`` is given. Warn of an exposure unknown ``before``."""
    if before.authenticated:
        print_exposure(session)
    with ignoring_closed_pipe():
        print_dashboard(console, session)
    if stdout is not None:
        with ignoring_closed_pipe(stdout):
            print_json_dashboard(stdout, session)


def _write_report(folder: Path) -> None:
    """Write the report. Print an error instead of raising it: the report can be made again, and the run is kept."""
    from tune_amp.report.report import write_report

    try:
        write_report(folder)
    except Exception as error:
        complain(f"report.html was not written: {describe_error(error)}")


def _load_checked(request: SearchRequest) -> "tuple[Dataset, dict[str, str]]":
    """Return the data set, checked to fit, and the result of ``check_fit``. Also import the search's modules early."""
    with importing():
        import torch

        from tune_amp.search.preflight import check_fit
        from tune_amp.training.data import make_long_tail

        importlib.import_module("tune_amp.search.run")
    arguments = request.arguments
    dataset = load_announced(arguments.dataset, arguments.data_dir, task=arguments.task, train=arguments.train)
    with naming_flags():
        dataset = make_long_tail(dataset, arguments.imbalance)
    if request.history is not None:
        check_same_data(dataset, request.history.provenance.data_hash)
    options = request.options
    may_use_gpus = options.gpus_per_trial != 0 and (arguments.address is not None or torch.cuda.is_available())
    unfit = check_fit(request.space, dataset, options, may_use_gpus=may_use_gpus)
    return dataset, unfit


def _call(function: Callable[[], _T], *, in_background: bool) -> Callable[[], _T]:
    """Call ``function``, here or in a thread that does not outlive the program.

    Returns:
        A function that waits for the thread, and returns its result or raises its exception.
    """
    future: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    if in_background:
        threading.Thread(target=run, daemon=True).start()
    else:
        future.set_result(function())
    return future.result


def _count_usable_gpus() -> int:
    """Return how many GPUs a local Ray may offer: only those that torch can use, or trials would train on the CPU.

    torch is queried only if Ray finds a GPU, since importing it takes a second.
    """
    from tune_amp.cluster.ray_patches import count_gpus_of_ray

    if count_gpus_of_ray() == 0:
        return 0
    import torch

    from tune_amp.cluster.resources import count_gpus

    return count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())


def _count_first_workers(options: SearchOptions, gpus: int) -> int:
    """Return how many trials will start at once at least. How many share a GPU is not known yet."""
    slots = count_cpus() // (options.cpus_per_trial or 1)
    if gpus and options.gpus_per_trial != 0:
        slots = min(slots, int(gpus / max(1, options.gpus_per_trial or 1)))
    return min(slots, options.num_samples, options.max_concurrent or slots)


def _user_modules(model: str) -> tuple[ModuleType, ...]:
    """Return the modules of a user's own model that the workers of a joined cluster lack.

    These are its top-level package or file, and the modules imported from the same folder.
    """
    if not is_function_name(model) or model in list_provided():
        return ()
    load_function(model)
    named = sys.modules[model.partition(":")[0].partition(".")[0]]
    folder = _find_folder(named)
    installed = {Path(place).resolve() for place in sysconfig.get_paths().values()}
    if folder in installed:  # the nodes need it installed too, with all the other packages
        return (named,)
    known = [module for name, module in sys.modules.items() if "." not in name and name not in ("__main__", "tune_amp")]
    return tuple(module for module in known if module is named or _find_folder(module) == folder)


def _find_folder(module: ModuleType) -> Path | None:
    """Return the folder that holds a package or a single module; None for a built-in module."""
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)]
    return Path(places[0]).resolve().parent if places[0] else None


def _reuse_command(arguments: argparse.Namespace, best: Path, program: str) -> str:
    from tune_amp.results.provenance import list_reuse_words

    if list_provided():  # no command finds a function of a notebook
        return f"tune_amp.load_best({str(best)!r})"
    train = _name_command(program, "train", str(Path(sys.argv[0]).with_name("train.py")))
    data_dir = None if arguments.data_dir is None else str(arguments.data_dir)
    return shlex.join(
        list_reuse_words(train, name_path(best), data_dir=data_dir, own_code=list_own_code(vars(arguments)))
    )


def _resume_command(request: SearchRequest) -> str:
    from tune_amp.cli.resume import name_resume_command, remember

    search = _name_command(request.command[0], "search", sys.argv[0])
    remembered = remember(request.arguments)
    return name_resume_command(search, request.folder, default_dir=DEFAULT_RESULTS_DIR, arguments=remembered)


def _name_command(program: str, name: str, script: str) -> tuple[str, str]:
    """Return how the user can type the command ``name``: as it is installed, or as ``script`` in this interpreter."""
    if program.startswith(("tune-amp", "tune_amp")):
        return "tune-amp", name
    python, here = Path(sys.executable), Path.cwd()
    if shutil.which("python") == str(python):
        return "python", script
    return str(python.relative_to(here) if python.is_relative_to(here) else python), script
