"""The function ``tune_amp.tune``: a search from a script or a notebook, by the same code as the command's."""

import _thread
import contextlib
import dataclasses
import difflib
import functools
import html
import inspect
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_amp.cli.console import mend_streams, open_console, say
from tune_amp.cli.search import search_with_ray
from tune_amp.cli.search_arguments import DEFAULT_SPACE, search_parser
from tune_amp.cli.search_request import SearchRequest, open_request
from tune_amp.cluster.interrupt import StopRequest, stopping_on_signals
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.options import name_flag
from tune_amp.trial.config import InputError, TrialConfig, check
from tune_amp.trial.consent import OWN_CODE_FLAGS, name_function
from tune_amp.trial.text import describe_error, shown

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

    from tune_amp.search.run import SearchResult
    from tune_amp.space.space import SearchSpace

PROGRAM = "tune_amp.tune"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The report of a run: an HTML file, which a notebook shows."""

    path: Path
    """The file; it needs no network."""

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 80vh; border: 0"></iframe>'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What a search found, read from its run folder."""

    folder: Path
    """The run folder; see ``docs/reading-results.md``."""
    interrupted: bool
    """Whether the search or its confirmation was cut off; ``tune(resume=...)`` continues it."""
    reason: str | None
    """Why it was cut off, or why the search ended early; None otherwise."""

    @property
    def best(self) -> TrialConfig:
        """The configuration of rank 1: the one to use.

        Raises:
            InputError: no trial has a result.
        """
        from tune_amp.results.records import load_best

        return load_best(self.folder)

    @property
    def verdict(self) -> str | None:
        """The sentence on whether searching gained anything over the defaults; None if it was not confirmed."""
        from tune_amp.results.records import load_best_rows

        if not RunFolder(self.folder).best.exists():
            return None
        found = [row.confirmation for row in load_best_rows(self.folder) if row.confirmation]
        return next((confirmation.verdict for confirmation in found if confirmation.verdict), None)

    @property
    def trials(self) -> Any:
        """One row a trial, as a ``pandas.DataFrame``; pandas must be installed, see ``trials_table``."""
        return self.trials_table.to_pandas()

    @property
    def epochs(self) -> Any:
        """One row a trial and epoch, as a ``pandas.DataFrame``; pandas must be installed, see ``epochs_table``."""
        return self.epochs_table.to_pandas()

    @property
    def trials_table(self) -> "pa.Table":
        """One row a trial, as a ``pyarrow.Table``."""
        return _read_table(RunFolder(self.folder).trials)

    @property
    def epochs_table(self) -> "pa.Table":
        """One row a trial and epoch, as a ``pyarrow.Table``."""
        return _read_table(RunFolder(self.folder).epochs)

    @property
    def report(self) -> Report:
        """The report, which a notebook shows."""
        return Report(path=RunFolder(self.folder).report)

    def _repr_html_(self) -> str:
        outcome = _describe_cut_off(self) if self.interrupted else self.verdict or self.reason or "not confirmed"
        report = self.report._repr_html_() if self.report.path.exists() else ""
        return f"<p><b>{html.escape(self.folder.name)}</b> {html.escape(outcome)}</p>{report}"


def tune(
    space: "str | Path | Mapping[str, Any] | None" = None,
    *,
    train: Callable[..., Any] | str | None = None,
    task: type | str | None = None,
    model: Callable[..., Any] | str | None = None,
    dataset: Callable[..., Any] | str | None = None,
    data_dir: str | Path | None = None,
    objective: str | None = None,
    mode: str | None = None,
    num_samples: int | None = None,
    max_epochs: int | None = None,
    seed: int | None = None,
    gpus_per_trial: float | None = None,
    max_concurrent: int | None = None,
    time_budget: float | None = None,
    confirm_seeds: int | None = None,
    name: str | None = None,
    results_dir: str | Path | None = None,
    warm_start: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
    **more: Any,
) -> TuneResult:
    """Search for the settings under which mixed-precision training works best, and confirm the winners.

    It does what ``tune-amp search`` does, with the same arguments under the same names, and may be called several times
    in a process. Ctrl-C, or the interrupt of a notebook, ends it cleanly: what was reported is kept. In a script, call
    it below ``if __name__ == "__main__":``.

    Args:
        space: what is searched: the name of a bundled space, a YAML file, YAML text, or the same as a mapping.
        train: your own training loop: a generator function that takes a ``tune_amp.Trial``.
        task: your own task: a subclass of ``tune_amp.Task``.
        model: your own model: a function of (input_shape, num_classes) and your own parameters; or a built-in one.
        dataset: your own data: a function without arguments; or the name of a data set.
        data_dir: folder of the data files.
        objective: metric to optimize, or several joined by commas.
        mode: ``max`` or ``min``, if the name of the objective does not say which values are better.
        num_samples: number of trials.
        max_epochs: epochs of a trial that is not stopped early.
        seed: seed of the sampler and of every trial.
        gpus_per_trial: GPUs a trial; 0.25 lets four trials share one.
        max_concurrent: largest number of trials at a time.
        time_budget: seconds after which trials are interrupted.
        confirm_seeds: most fresh seeds to confirm the best on; 0: none.
        name: name of the run.
        results_dir: where run folders are made.
        warm_start: an earlier run to start from.
        resume: a run to resume, by name or folder; give your own code again, and what may change, as num_samples.
        quiet: whether to print nothing.
        more: further arguments of ``tune-amp search``: ``grace_period``, ``sampler``, ``scheduler``, ``tracker``, ...

    Returns:
        The result, which a notebook shows with its report.

    Raises:
        InputError: an argument, the space or the data are not valid; the message says what and why.
        StartError: Ray could not be started.
        KeyboardInterrupt: the search was interrupted before it could begin.
    """
    given: dict[str, Any] = {**locals(), **more}  # before there are other local variables
    begun = time.monotonic()
    del given["space"], given["more"]
    if open_console().is_jupyter:  # nothing here needs ipywidgets, which both ask for
        warnings.filterwarnings("ignore", message="IProgress not found")
        logging.getLogger("ray.widgets").setLevel(logging.WARNING)
    code = {flag: given[flag] for flag in OWN_CODE_FLAGS if given[flag]}
    named = {flag: value if isinstance(value, str) else name_function(value) for flag, value in code.items()}
    objects = [value for value in code.values() if not isinstance(value, str)]
    if len(set(named.values())) < len({*map(id, objects)}):
        raise InputError(f"{', '.join(named)}: must have different names, got {', '.join(named.values())}")
    parser = search_parser("tune-amp search")
    known = vars(parser.parse_args([])).keys() - {"json"}
    if unknown := sorted(more.keys() - known):
        raise InputError(f"{unknown[0]}: is no argument of tune_amp.tune{_suggest_argument(unknown[0])}")
    mend_streams()
    if resume is not None:
        check("space", space, space is None, "must be left out beside resume, which has the space of the run")
    words = _list_words(given | named)
    load = functools.partial(_load_space, space)
    with open_request(parser, words, parser.parse_args(words), load, (PROGRAM,), begun) as request:
        return _run(request)


def _list_words(given: Mapping[str, Any]) -> list[str]:
    """Return arguments as the words of a command line, which joins the parts of a list by commas."""
    texts = {
        name: (",".join(map(str, value)) or None) if isinstance(value, list | tuple) else value
        for name, value in given.items()
    }
    words = ["--quiet"] if texts.pop("quiet") else []
    return [*words, *(f"{name_flag(name)}={text}" for name, text in texts.items() if text is not None)]


def _run(request: SearchRequest) -> TuneResult:
    def leave() -> None:
        if threading.current_thread() is not threading.main_thread():
            _thread.interrupt_main()
        else:
            raise KeyboardInterrupt

    stop = StopRequest(leave)
    is_main = threading.current_thread() is threading.main_thread()
    with stopping_on_signals(stop) if is_main else contextlib.nullcontext():
        result: SearchResult = search_with_ray(request, stop, sys.stdout)
    found = TuneResult(folder=result.folder, interrupted=result.is_cut_off, reason=result.reason)
    if found.interrupted:
        say(open_console(quiet=request.arguments.quiet), _describe_cut_off(found))
    return found


def _describe_cut_off(result: TuneResult) -> str:
    call = f"tune_amp.tune(resume={str(result.folder)!r})"
    return f"cut off  {result.reason or 'interrupted'}: {call} resumes it; give your own code again"


def _suggest_argument(name: str) -> str:
    if name in TrialConfig.__dataclass_fields__:
        return ": a setting of trials is searched or fixed by the space (parameters, fixed)"
    near = difflib.get_close_matches(name, inspect.signature(tune).parameters, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _load_space(space: "str | Path | Mapping[str, Any] | None") -> "tuple[SearchSpace, str]":
    """Return the space, and a name for the run."""
    from tune_amp.space.space import load_space, parse_space

    if space is None or isinstance(space, Path) or (isinstance(space, str) and "\n" not in space and ":" not in space):
        name = str(space or DEFAULT_SPACE)
        return load_space(name), name
    if isinstance(space, str):
        return parse_space("space", space), "search"
    if not isinstance(space, Mapping):
        raise InputError(f"space: must be a name, a path, YAML text or a mapping, got {shown(space)}")
    import yaml

    try:
        text = yaml.safe_dump(_to_plain(space), sort_keys=False)
    except yaml.YAMLError as error:
        raise InputError(f"space: must hold numbers, texts, lists and mappings ({describe_error(error)})") from None
    return parse_space("space", text), "search"


def _to_plain(value: Any) -> Any:
    """Return a value of a space as YAML has it: own lists and mappings, and no types of NumPy."""
    if isinstance(value, Mapping):
        return {name: _to_plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _read_table(path: Path) -> "pa.Table":
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    return pq.read_table(path)
