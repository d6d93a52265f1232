"""The output of ``tune-amp search`` at start and end: text for people, JSON lines for programs."""

import argparse
import contextlib
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from tune_amp.cli.console import is_screen, open_console, say, torch_threads
from tune_amp.trial.config import TrialConfig
from tune_amp.trial.text import printable

if TYPE_CHECKING:
    from tune_amp.cluster.resources import TrialResources
    from tune_amp.cluster.session import RaySession
    from tune_amp.results.progress import Observer
    from tune_amp.search.plan import SearchPlan
    from tune_amp.search.run import SearchResult
    from tune_amp.training.data import Dataset

SLOW_EPOCH_SECONDS = 120.0


def choose_observer(
    arguments: argparse.Namespace, console: Console, stdout: IO[str]
) -> "contextlib.AbstractContextManager[Observer]":
    """Return the observer that shows the running search as the command line asks, in a context manager."""
    from tune_amp.monitor.terminal import JsonLines, LiveTable, PlainLines

    if arguments.json:
        return contextlib.nullcontext(JsonLines(stdout))
    is_live = not console.quiet and (console.is_jupyter or is_screen(console))
    return LiveTable(console) if is_live else contextlib.nullcontext(PlainLines(console))


def print_start(
    console: Console, plan: "SearchPlan", session: "RaySession", notes: Sequence[str] = (), trackers: Sequence[str] = ()
) -> None:
    """Print model, data, space, resources and how the search resumes, with warnings.

    ``notes`` are changes since the resumed run began, ``trackers`` the names of those that the search reports to.
    """
    import torch

    from tune_amp.cli.resume import describe_progress
    from tune_amp.monitor.trackers import describe_tracker
    from tune_amp.training.amp import describe_hardware
    from tune_amp.training.data import describe_tail

    if console.quiet:
        return  # nothing would be shown, so no step is timed either

    def show(kind: str, *lines: str, style: str | None = None) -> None:
        for line in lines:
            say(console, f"{kind:<11}{line}", style="yellow" if kind in ("inert", "note") else style)

    space, dataset, options, resources = plan.space, plan.dataset, plan.options, plan.resources
    sizes = f"{len(dataset.train):,} training{describe_tail(dataset)} and {len(dataset.validation):,} validation images"
    reading = "the test set is read by confirmed runs only" if options.confirm_seeds else "the test set stays unread"
    subject = f"[bold]{escape(options.model)}[/] on [bold]{escape(dataset.name)}[/]: {sizes}"  # both are checked names
    if options.train is not None:
        subject = f"[bold]{escape(options.train)}[/]: your own training loop and data"
    console.print(f"{subject}; {reading}", soft_wrap=not is_screen(console))
    show("space", f"{space.source}: {', '.join(p.name for p in space.parameters)}")
    show("inert", *list_inert(plan))
    show("resources", resources.reason)
    if session.mps and 0 < resources.gpus < 1:
        show("mps", session.mps)
    if "train_seconds" in options.objectives and resources.max_concurrent > 1:
        text = "trials that run side by side slow each other down; --max-concurrent 1 measures them alone"
        show("note", f"train_seconds: {text}")
    device = torch.device("cuda" if resources.gpus else "cpu")
    is_here = device.type == "cpu" or torch.cuda.is_available()  # else what the GPUs of other nodes lack is not known
    for precision in space.precisions if is_here else ():
        if notice := describe_hardware(precision, device):
            show("note", f"{precision}: {notice}")
        if device.type == "cpu" and options.train is None:
            show("slow", *_find_slow_epochs(options.model, precision, dataset, resources.cpus), style="bold yellow")
    show("note", *(describe_unfit(options.model, *unfit, resources) for unfit in plan.unfit.items()))
    show("warm", *(plan.warm_start.describe() if plan.warm_start else ()))
    if plan.history is not None:
        show("resumed", describe_progress(plan.history, options.num_samples, options.time_budget))
    show("note", *notes)
    for name in trackers:  # whole, to be copied
        console.print(printable(f"tracker    {describe_tracker(name, plan.folder)}"), markup=False, soft_wrap=True)


def print_exposure(session: "RaySession") -> None:
    """Print a warning if Ray requires no token."""
    if session.exposure:
        say(open_console(stderr=True), f"WARNING: {session.exposure}", style="bold red")


def print_dashboard(console: Console, session: "RaySession") -> None:
    """Print the address of Ray's dashboard, and where its token lies."""
    if session.dashboard_url is None:
        say(console, "dashboard  none: this Ray could not start it; pip install 'ray[default]' has what it needs")
        return
    hint = "not the one that `ray get-auth-token` prints"
    way_in = f", token in {session.token_path} ({hint})" if session.token_path else ""
    console.print(f"dashboard  {session.dashboard_url}{way_in}", soft_wrap=True)


def describe_unfit(model: str, precision: str, reason: str, resources: "TrialResources") -> str:
    """Return the consequence of ``model`` not running in ``precision`` on this machine's CPU."""
    if resources.gpus:
        return f"{precision}: {model} does not run on this machine's CPU ({reason}); trials run on GPUs"
    return f"{precision}: {model} does not run here ({reason}): such trials are recorded as infeasible"


def list_inert(plan: "SearchPlan") -> list[str]:
    """Return a line for each searched setting that has no effect."""
    from tune_amp.space.no_effect import describe_inert, estimate_inert

    sizes = {"train_images": len(plan.dataset.train), "max_epochs": plan.options.max_epochs}
    return describe_inert(estimate_inert(plan.space, **sizes), plan.space, **sizes)


def _find_slow_epochs(model: str, precision: str, dataset: "Dataset", num_threads: int) -> list[str]:
    """Time a step before the search. Return a line if epochs are slow, so that hours of waiting are no surprise."""
    import torch

    from tune_amp.training.run import estimate_epoch_seconds

    config = TrialConfig(model=model, precision=precision)
    try:
        with torch_threads(num_threads):
            seconds = estimate_epoch_seconds(config, dataset.train, dataset.num_classes, torch.device("cpu"))
    except Exception:  # a user's model may raise anything in training: its trials record it
        return []
    if seconds < SLOW_EPOCH_SECONDS:
        return []
    text = f"an epoch of {model} will take about {seconds / 60:.0f} min here; the first report comes after that"
    return [f"{precision}: {text}"]


def print_end(console: Console, result: "SearchResult", reuse: str) -> None:
    """Print the result, with ``reuse``, the command that trains the winner."""
    from tune_amp.cli.run_summary import RunSummary, print_summary
    from tune_amp.results.records import rank_trials

    confirmation = result.confirmation
    summary = RunSummary(
        folder=result.folder,
        trials=result.trials,
        ranked=result.ranked,
        best=confirmation.rows if confirmation and not confirmation.interrupted else rank_trials(result.ranked),
        confirmed_runs=confirmation.runs if confirmation else (),
        provenance=result.provenance,
        importance=result.importance,
        slot_time=result.slot_time,
        interrupted=result.interrupted and not result.failing,
        is_out_of_time=result.is_out_of_time,
        wrap_up_seconds=result.wrap_up_seconds,
        confirm_seconds=confirmation.seconds if confirmation else None,
    )
    if confirmation and confirmation.left_out:
        say(console, confirmation.left_out, style="yellow")
    # The reasons for having no winner are printed at every verbosity.
    print_summary(console, summary, reuse, errors=open_console(stderr=True))


def print_json_start(stdout: IO[str], plan: "SearchPlan", session: "RaySession") -> None:
    """Write the first JSON line: where the run is, and what it starts with."""
    from tune_amp.monitor.terminal import JsonLines

    found = {
        "run": plan.folder.name,
        "dataset": plan.dataset.name,
        "objectives": plan.options.objectives,
        "folder": str(plan.folder),
        "authenticated": session.authenticated,
        "inert": list_inert(plan),
        "unfit": plan.unfit,
        "warm_start": plan.warm_start and plan.warm_start.describe_as_json(),
    }
    JsonLines(stdout).write("start", found)


def print_json_dashboard(stdout: IO[str], session: "RaySession") -> None:
    """Write the JSON line of Ray's dashboard: its address, None if it did not start, and where its token lies."""
    from tune_amp.monitor.terminal import JsonLines

    found = {
        "url": session.dashboard_url,
        "token_path": session.token_path and str(session.token_path),
        "authenticated": session.authenticated,
    }
    JsonLines(stdout).write("dashboard", found)


def print_json_end(stdout: IO[str], result: "SearchResult", resume: str) -> None:
    """Write the last JSON line: the result, and ``resume``, the command that resumes the run, if it was cut off."""
    from tune_amp.monitor.terminal import JsonLines, describe_as_json, describe_confirmation_as_json
    from tune_amp.results.utilisation import utilisation

    found: dict[str, Any] = {
        "best": [{"rank": rank, **describe_as_json(trial)} for rank, trial in enumerate(result.ranked, start=1)],
        "best_parquet": str(result.best_path) if result.ranked else None,
        "importance": [vars(row) for row in result.importance.rows],
        "interrupted": result.interrupted,
        "reason": result.reason,
        "resume": resume if result.is_cut_off else None,
        "confirmation": result.confirmation and describe_confirmation_as_json(result.confirmation),
        "utilisation": {**vars(result.slot_time), "seconds": utilisation(result.trials, result.slot_time)},
    }
    JsonLines(stdout).write("result", found)
