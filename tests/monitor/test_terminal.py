import dataclasses
import errno
import io
import json
import math
import time
import types
from collections.abc import Sequence
from typing import Any

import pytest
from records import INF, NAN, PROVENANCE, make_epoch, make_scored, make_trial
from rich.console import Console, RenderableType
from rich.live import Live

from tune_amp.monitor import terminal as monitoring
from tune_amp.monitor.tables import render_ranking
from tune_amp.monitor.terminal import (
    JsonLines,
    LiveTable,
    PlainLines,
    describe_as_json,
    describe_confirmation_as_json,
    describe_counts,
    describe_time,
    describe_trial,
    render_confirmation,
    render_importance,
    render_progress,
)
from tune_amp.results.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.results.importance import ImportanceResult, ParameterImportance
from tune_amp.results.progress import ConfirmJob, ConfirmProgress, ConfirmResult, SearchProgress
from tune_amp.results.provenance import Provenance
from tune_amp.results.ranking import describe_ties, rank_confirmed
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import TrialConfig, TrialStatus
from tune_amp.trial.text import format_scale

NAME = "07-fp16-lr0.0031-b1024-scale2^12"
WIDE = TrialConfig(
    precision="fp16", lr=0.00012345, batch_size=1024, init_scale=2.0**-24, growth_interval=2000, max_epochs=100
)


def show(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(renderable)
    return console.export_text()


def make_progress(trials: Sequence[TrialRecord] = (), running: Sequence[str] = (), **changes: Any) -> SearchProgress:
    progress = SearchProgress(
        run="quick-1",
        model="simple_net",
        dataset="digits",
        objectives=("val_accuracy",),
        num_samples=16,
        time_budget=None,
        started=time.monotonic(),
        trials=tuple(trials),
        running=frozenset(running),
    )
    return dataclasses.replace(progress, **changes)


def make_provenance(*names: str, objective: str = "val_accuracy") -> Provenance:
    """Of a run that searched these parameters, own ones with their prefix."""
    choices = "{choices: [1, 2]}"
    fields = [f"  {name}: {choices}\n" for name in names if not name.startswith("own.")]
    own = [f"  {name.removeprefix('own.')}: {choices}\n" for name in names if name.startswith("own.")]
    fixed = "fixed:\n  precision: fp16\n"
    text = "".join([*(["parameters:\n"] if fields else []), *fields, *(["own:\n"] if own else []), *own, fixed])
    return dataclasses.replace(PROVENANCE, space_text=text, objective=objective)


FIVE = ("lr", "batch_size", "init_scale", "growth_interval", "weight_decay")


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# The live view


class GoneTerminal(io.StringIO):
    """Writing fails as soon as nobody reads any more; nothing else says so."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


def test_terminal_that_went_away_is_no_fault_of_the_search() -> None:
    terminal = GoneTerminal()
    with LiveTable(Console(file=terminal, width=80, force_terminal=True)):
        terminal.gone = True


def test_live_view_shows_every_number_of_a_running_trial_within_80_columns() -> None:
    last = make_epoch(
        99,
        val_accuracy=0.98765,
        train_loss=1234.56789,
        loss_scale=1.5e-7,
        state="calibrating",
        skipped_steps=123456,
        steps=999999,
    )
    trials = [
        make_trial("a", trial_name=NAME, config=WIDE, epochs=(last,), status=TrialStatus.INTERRUPTED),
        make_trial("b", trial_name="08-fp32-lr0.1-b64", config=TrialConfig(max_epochs=5), epochs=()),
        make_scored("c", 0.9876, trial_name=NAME.replace("07", "05")),
    ]
    text = show(render_progress(make_progress(trials, ["a", "b"])))
    assert "…" not in text
    assert [NAME, "99/100", "98.77%", "1,235", "1.5e-07", "too", "high"] in words(text)
    assert [NAME, "123456"] in words(text)  # what does not fit follows below
    assert [NAME, "99/100", "98.77%", "1,235", "1.5e-07", "too", "high", "123456"] in words(
        show(render_progress(make_progress(trials, ["a", "b"])), 120)
    )
    assert ["08-fp32-lr0.1-b64", "0/5"] in words(text)
    assert [NAME.replace("07", "05"), "completed", "1/5", "98.76%"] in words(text)
    assert "1 of 16 trials ended: 1 completed" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_live_view_keeps_the_best_three_and_the_last_that_ended() -> None:
    scores = [
        make_scored(name, score, trial_name=f"trial-{name}")
        for name, score in {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.8}.items()
    ]
    table = LiveTable(Console(file=io.StringIO(), width=80))
    table.on_progress(make_progress(scores), scores[0])
    table.on_progress(make_progress(scores), None)
    shown = words(show(table._render()))
    best = [line[0] for line in shown if line[-1:] and line[-1].endswith("0%") and line[0].startswith("trial-")]
    assert best == ["trial-b", "trial-d", "trial-c"]
    assert ["last", "ended", "trial-a", "completed", "epoch", "1", "val_accuracy", "50.00%"] in [
        line[:8] for line in shown
    ]


def test_live_view_shows_how_long_a_running_trial_has_been_in_its_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(monitoring, "time", types.SimpleNamespace(monotonic=lambda: now))
    table = LiveTable(Console(file=io.StringIO(), width=120))
    waiting, reported = (make_trial("a", trial_name="t", epochs=epochs) for epochs in ((), (make_epoch(1),)))

    def row() -> list[str]:
        return next(line for line in words(show(table._render(), 120)) if line[0] == "t")

    table.on_progress(make_progress([waiting], ["a"]), None)
    now = 112.0
    table.on_progress(make_progress([waiting], ["a"]), None)  # another trial reported
    assert row()[:3] == ["t", "0/5", "12s"]
    table.on_progress(make_progress([reported], ["a"]), None)
    now = 115.0
    assert row()[:3] == ["t", "1/5", "3s"]


def test_an_own_metric_is_shown_wherever_the_search_is() -> None:
    own = {"val_accuracy": None, "val_loss": None, "metrics": {"val_f1": 0.876543}}
    trials = [make_trial(name, trial_name=f"trial-{name}", epochs=(make_epoch(1, **own),)) for name in "ab"]
    progress = make_progress(trials, ["a"], objectives=("val_f1",))
    text = show(render_progress(progress, trials[1]))
    assert words(text)[2][-1:] == ["skipped"]
    assert "accuracy" not in text
    assert "trial-b  completed  epoch 1  val_f1 0.8765" in text
    assert [line[-1] for line in words(text) if line[:2] == ["trial-b", "completed"]] == ["0.8765"]
    stream = io.StringIO()
    PlainLines(Console(file=stream, width=80)).on_progress(progress, trials[1])
    assert stream.getvalue() == "[1/16] trial-b  completed  epoch 1  val_f1 0.8765  1 of 100 steps skipped\n"
    event = describe_as_json(dataclasses.replace(trials[1], config=TrialConfig(own={"hidden": 64})))
    assert (event["metrics"]["val_f1"], event["config"]["own.hidden"]) == (0.876543, 64)


def test_an_own_metric_is_shown_wherever_the_confirmation_is() -> None:
    run = make_confirmed("a", 1000, None, val_loss=None, metrics={"val_f1": 0.876543})
    progress = dataclasses.replace(make_confirmation(run), objective="val_f1")
    text = show(render_confirmation(progress))
    assert [f"{NAME}[/]", "1/2", "0.8765"] in words(text)
    assert "accuracy" not in text
    stream = io.StringIO()
    PlainLines(Console(file=stream, width=80)).on_confirmation(progress, run)
    assert stream.getvalue() == f"[confirm 1/4] {NAME}[/]  seed 1000  completed  val_f1 0.8765\n"
    JsonLines(stream := io.StringIO()).on_confirmation(progress, run)
    assert json.loads(stream.getvalue())["val_f1"] == 0.876543


def test_live_view_shows_nan_as_nan() -> None:
    last = make_epoch(2, val_accuracy=NAN, train_loss=INF)
    text = show(render_progress(make_progress([make_trial("a", trial_name="t", epochs=(last,))], ["a"])))
    [row] = [line for line in words(text) if line[:1] == ["t"]]
    assert row[2:4] == ["nan%", "inf"]
    assert "best so far" not in text


def test_live_view_before_the_first_trial_says_so() -> None:
    table = LiveTable(Console(file=io.StringIO(), width=80))
    assert "starting workers" in show(table._render())
    text = show(render_progress(make_progress()))
    assert "best so far" not in text
    assert "0 of 16 trials ended\n" in text


def test_names_with_brackets_are_shown_as_they_are() -> None:
    """Rich would read them as markup: ``[/]`` without an opening tag is an error, ``[red]`` would vanish."""
    trial = make_trial("a", trial_name="07-[red]x[/]-[bold", error="[/] [link=x]")
    progress = make_progress([trial], ["a"], run="[/]run", model="my[0]:net", dataset="[data]:f")
    text = show(render_progress(progress))
    for part in ("07-[red]x[/]-[bold", "[/]run", "my[0]:net", "[data]:f"):
        assert part in text
    stream = io.StringIO()
    PlainLines(Console(file=stream, width=80)).on_progress(progress, trial)
    assert "07-[red]x[/]-[bold" in stream.getvalue()
    assert "[/] [link=x]" in stream.getvalue()


def test_live_table_draws_the_last_progress_and_clears_itself() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, height=24, force_terminal=True)
    with LiveTable(console) as table:
        table.on_progress(make_progress(run="first"), None)
        table.on_progress(make_progress(run="second"), None)
        assert isinstance(table._live, Live)
        table._live.refresh()
    drawn = stream.getvalue()
    assert "second" in drawn
    assert "first" not in drawn.partition("second")[2]
    assert drawn.endswith("\x1b[1A\x1b[2K")  # up a line and erase it: nothing is left behind


# Lines


def test_plain_lines_print_a_line_for_each_trial_that_ends_however_long() -> None:
    stream = io.StringIO()
    lines = PlainLines(Console(file=stream, width=40))
    trial = make_scored("a", 0.9, trial_name=NAME, error="why " * 30)
    lines.on_progress(make_progress([trial, make_trial("b")], ["a", "b"]), None)
    assert stream.getvalue() == ""
    lines.on_progress(make_progress([trial, make_trial("b")], ["b"]), trial)
    [line] = stream.getvalue().splitlines()
    assert line == f"[1/16] {describe_trial(trial)}"


@pytest.mark.parametrize(
    ("trial", "expected"),
    [
        (make_trial(trial_name="t", epochs=()), "t  completed"),
        (make_trial(trial_name="t", status=TrialStatus.FAILED, epochs=(), error="why"), "t  failed  why"),
        (
            make_trial(trial_name="t", epochs=(make_epoch(3, val_accuracy=0.98765, skipped_steps=0),)),
            "t  completed  epoch 3  val_accuracy 98.77%",
        ),
        (
            make_trial(
                trial_name="t",
                status=TrialStatus.DIVERGED,
                epochs=(make_epoch(1, val_accuracy=NAN, skipped_steps=7, steps=9),),
                error="train_loss is nan",
            ),
            "t  diverged  epoch 1  val_accuracy nan%  7 of 9 steps skipped  train_loss is nan",
        ),
    ],
)
def test_trial_is_described_on_one_line(trial: TrialRecord, expected: str) -> None:
    assert describe_trial(trial) == expected


def strict_json(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    event: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return event


def test_json_lines_are_strict_json_with_null_for_what_json_cannot_say() -> None:
    stream = io.StringIO()
    observer = JsonLines(stream)
    trial = make_trial(
        "1e5", status=TrialStatus.DIVERGED, epochs=(make_epoch(1, val_loss=NAN, train_loss=INF),), error="a\nb"
    )
    observer.on_progress(make_progress([trial], ["1e5"]), None)
    observer.on_progress(make_progress([trial]), trial)
    [line] = stream.getvalue().splitlines()
    event = strict_json(line)
    assert (event["event"], event["trial_id"], event["status"], event["error"]) == ("trial", "1e5", "diverged", "a b")
    assert event["metrics"]["val_loss"] is None
    assert event["metrics"]["train_loss"] is None
    assert event["metrics"]["val_accuracy"] == 0.9
    assert event["config"]["lr"] == 0.003
    assert "loss_scale_steps" not in event["metrics"]  # a whole trajectory


def test_json_line_of_a_result_has_null_for_nan_inside_its_list_too() -> None:
    stream = io.StringIO()
    trial = make_trial(epochs=(make_epoch(1, train_loss=NAN),))
    JsonLines(stream).write("result", {"best": [{"rank": 1, **describe_as_json(trial)}], "seconds": INF})
    event = strict_json(stream.getvalue())
    assert event["best"][0]["metrics"]["train_loss"] is None
    assert event["seconds"] is None


def test_json_of_a_trial_without_a_report_has_no_metrics() -> None:
    assert describe_as_json(make_trial(epochs=()))["metrics"] == {}


# The ranking


def test_ranking_shows_every_number_within_80_columns() -> None:
    last = make_epoch(100, val_accuracy=1.0, val_loss=99.99987, skipped_steps=99999)
    ranked = [
        make_trial("a", config=WIDE, epochs=(last,), wall_seconds=3600.4),
        make_scored("b", 0.98765, 1234.5678, config=TrialConfig(lr=0.5, batch_size=64, max_epochs=5)),
    ]
    text = show(render_ranking(ranked, make_provenance(*FIVE)))
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    rows = [line for line in words(text) if line[:1] in (["1"], ["2"])]
    assert rows == [
        ["1", "0.000123", "1024", "2^-24", "2000", "0", "100/100", "100.00%", "100.0", "99999"],
        ["2", "0.5", "64", "0", "1/5", "98.77%", "1,235", "1"],
        ["1", "60m00s"],
        ["2", "4s"],
    ]


@pytest.mark.parametrize("width", [50, 80, 120])
def test_ranking_shows_what_was_searched_and_breaks_between_words_only(width: int) -> None:
    searched = ("weight_decay", "batch_size", "own.hidden")
    config = dataclasses.replace(WIDE, own={"hidden": 2})
    text = show(render_ranking([make_trial(config=config)], make_provenance(*searched)), width)
    titles = {"weight", "decay", "batch", "size", "own.hidden", "epochs", "validation", "accuracy", "loss", "skipped"}
    found = {word for line in words(text) for word in line if not word[0].isdigit()}
    assert found == titles | {"#", "steps", "time"}
    assert all(len(line) <= width for line in text.splitlines())


def test_ranking_shows_a_setting_that_is_null_and_none_that_is_inactive() -> None:
    config = TrialConfig(precision="bf16", grad_clip=None)
    text = show(render_ranking([make_trial(config=config)], make_provenance("grad_clip", "init_scale")))
    assert words(text)[1][:3] == ["#", "clip", "epochs"]
    assert words(text)[2][:2] == ["1", "null"]


@pytest.mark.parametrize(
    ("accuracies", "beginning"),
    [
        ([0.97], "One seed on 5,000 validation images, a standard error of 0.24 points: other seeds will differ"),
        ([1.0], "One seed on 5,000 validation images: other seeds will differ"),
        ([0.97, 0.50], "Rank 1 leads by more than the noise of 5,000 validation images; one seed each"),
        ([0.97, 0.969, 0.5], "Ranks 1 to 2 are indistinguishable on 5,000 validation images (2 standard errors)"),
        ([0.97, 0.97, 0.97], "Ranks 1 to 3 are indistinguishable"),
    ],
)
def test_sentence_about_ties_says_what_the_ranking_can_tell(accuracies: list[float], beginning: str) -> None:
    ranked = [make_scored(f"{number}", accuracy) for number, accuracy in enumerate(accuracies)]
    assert describe_ties(ranked, PROVENANCE).startswith(beginning)


def test_sentence_about_ties_says_how_trials_that_ended_early_count() -> None:
    ranked = [make_scored("a", 0.9, status=TrialStatus.STOPPED), make_scored("b", 0.8, status=TrialStatus.STOPPED)]
    early = "Those with fewer epochs ended early, and count with the accuracy they had."
    assert describe_ties(ranked, PROVENANCE).endswith(early)
    assert early not in describe_ties([make_scored("a", 0.9)], PROVENANCE)
    by_loss = dataclasses.replace(PROVENANCE, objective="val_loss")
    assert describe_ties(ranked, by_loss).startswith("No trial completed")
    assert describe_ties([make_scored("a", 0.9)], by_loss) == ""


def test_sentence_about_a_pareto_set_names_its_objectives() -> None:
    for objective, names in (
        ("val_accuracy,train_seconds", "val_accuracy and train_seconds"),
        ("val_f1,val_loss:min,train_seconds", "val_f1, val_loss and train_seconds"),
    ):
        origin = dataclasses.replace(PROVENANCE, objective=objective)
        sentence = describe_ties([make_scored("a", 0.9), make_scored("b", 0.8)], origin)
        assert sentence.startswith(f"The Pareto set of {names}:")


def test_ranking_shows_the_costs_that_were_objectives() -> None:
    last = make_epoch(2, peak_memory_bytes=3 * 2**20, train_seconds=12.34)
    ranked = [make_trial("a", epochs=(last,))]
    shown = show(render_ranking(ranked, make_provenance("lr"))).split()
    assert [cell in shown for cell in ("12.3s", "3.00MiB")] == [False, False]
    for objective, cells in (("train_seconds", {"training", "12.3s"}), ("peak_memory_bytes", {"memory", "3.00MiB"})):
        both = make_provenance("lr", objective=f"val_accuracy,{objective}")
        assert cells <= set(show(render_ranking(ranked, both)).split())


def test_importance_is_shown_beside_what_permuted_values_reach() -> None:
    rows = (
        ParameterImportance(parameter="lr", importance=0.9, null_95=0.2, p_value=0.0025, told_from_noise=True, raw=1.0),
        ParameterImportance(
            parameter="batch_size", importance=0.1, null_95=0.3, p_value=0.5, told_from_noise=False, raw=0.1
        ),
    )
    result = ImportanceResult(objective="val_accuracy", epoch=1, trials=32, method="PED-ANOVA", rows=rows)
    shown = words(show(render_importance(result)))
    assert ["lr", "0.90", "0.20", "0.003"] in shown
    assert ["batch_size", "0.10", "0.30", "0.500", "not", "distinguishable", "from", "chance"] in shown


def test_counts_list_each_status_that_occurs() -> None:
    statuses = ["completed"] * 5 + ["stopped"] * 2 + ["diverged", "out_of_memory", "failed", "interrupted"]
    trials = [make_trial(f"{number}", status=TrialStatus(status)) for number, status in enumerate(statuses)]
    expected = "11 trials: 5 completed, 2 stopped, 1 diverged, 1 out_of_memory, 1 failed, 1 interrupted"
    assert describe_counts(trials).plain == expected
    assert describe_counts([]).plain == "0 trials"
    assert describe_counts([make_trial()]).plain == "1 trial: 1 completed"


# The clock


@pytest.mark.parametrize(
    ("spent", "ended", "changes", "expected"),
    [
        (0.4, 0, {}, "0s spent"),
        (59.6, 1, {}, "1m00s spent"),  # nothing follows from one trial, start-up and all
        (40, 4, {}, "40s spent, about 1m55s left"),  # 11 trials and half of one, of 10 s each
        (40, 4, {"slots": 2}, "40s spent, about 58s left"),
        (
            40,
            4,
            {"slots": 2, "confirm_runs": 8},
            "40s spent, about 4m38s left with confirmation",
        ),  # of 5 epochs; 20 s to start
        (40, 4, {"time_budget": 100.0}, "40s spent, about 1m00s left"),
        (40, 4, {"time_budget": 30.0}, "40s spent, about 0s left"),
        (40, 4, {"time_budget": 30.0, "confirm_runs": 1}, "40s spent, about 50s left with confirmation"),
        (160, 15, {}, "2m40s spent, about 5s left"),
        (7200, 2, {"num_samples": 723}, "120m00s spent, about 120m05s left"),
    ],
)
def test_time_left_is_estimated_from_the_second_trial_on(
    monkeypatch: pytest.MonkeyPatch, spent: float, ended: int, changes: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(monitoring, "time", types.SimpleNamespace(monotonic=lambda: 1000.0 + spent))
    trials = [make_trial(f"{number}", wall_seconds=10.0, epochs=(make_epoch(1),)) for number in range(ended + 1)]
    progress = make_progress(trials, [f"{ended}"], started=1000.0, **changes)
    assert describe_time(progress) == expected


def test_time_left_of_a_confirmation_counts_the_runs_that_may_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run that ends waited for its worker to start, so the pace is that of the later ones."""
    now = 0.0
    monkeypatch.setattr(monitoring, "time", types.SimpleNamespace(monotonic=lambda: now))
    table = LiveTable(Console(file=io.StringIO(), width=80))
    for now, done in ((0.0, 0), (20.0, 1)):  # noqa: B007 - the clock reads it
        progress = dataclasses.replace(make_confirmation(*CONFIRMED[:done]), started=0.0)
        table.on_confirmation(progress, CONFIRMED[0] if done else None)
        assert "left" not in show(table._render())
    now = 30.0
    progress = dataclasses.replace(make_confirmation(*CONFIRMED), started=0.0)
    table.on_confirmation(progress, CONFIRMED[2])
    assert "30s spent, about 5s left" in show(table._render())
    table.on_confirmation(dataclasses.replace(progress, may_follow=7), None)
    assert "30s spent, about 40s left" in show(table._render())


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (None, ""),
        (65536.0, "2^16"),
        (1.0, "2^0"),
        (0.5, "2^-1"),
        (2.0**-24, "2^-24"),
        (2.0**127, "2^127"),
        (3.0, "3"),
        (58982.4, "5.898e+04"),
        (0.0, "0"),
        (INF, "inf"),
    ],
)
def test_loss_scale_is_written_as_a_power_of_two_where_it_is_one(scale: float | None, expected: str) -> None:
    assert format_scale(scale) == expected


def test_nan_scale_is_written_as_nan() -> None:
    assert format_scale(math.nan) == "nan"


# The confirmation


def make_confirmed(trial_id: str, seed: int, accuracy: float | None, **changes: Any) -> ConfirmedRun:
    values: dict[str, Any] = {"status": TrialStatus.COMPLETED, "val_loss": 0.1, "test_accuracy": 0.9, **changes}
    return ConfirmedRun(trial_id=trial_id, seed=seed, val_accuracy=accuracy, **values)


CONFIRMED = (
    make_confirmed("a", 1000, 0.97),
    make_confirmed("a", 1001, 0.98),
    make_confirmed(DEFAULT_ID, 1000, None, status=TrialStatus.DIVERGED, error="diverged: weights are not finite"),
)


JOBS = [
    ConfirmJob(trial_ids=(name,), config=TrialConfig(seed=seed)) for seed in (1000, 1001) for name in ("a", DEFAULT_ID)
]


def make_confirmation(*runs: ConfirmedRun) -> ConfirmProgress:
    names = {"a": f"{NAME}[/]", DEFAULT_ID: DEFAULT_ID}
    return ConfirmProgress(
        run="quick-1",
        jobs=JOBS,
        names=names,
        objective="val_accuracy",
        total=4,
        done=len(runs),
        runs=runs,
        started=time.monotonic(),
    )


def test_live_view_of_a_confirmation_shows_each_configuration_with_its_mean_so_far() -> None:
    text = show(render_confirmation(make_confirmation(*CONFIRMED)))
    assert "quick-1  3 of 4 runs on fresh seeds" in text
    assert [f"{NAME}[/]", "2/2", "97.50%"] in words(text)
    assert [DEFAULT_ID, "1/2", "1", "failed"] in words(text)
    assert all(len(line) <= 80 for line in text.splitlines())


def test_live_table_goes_on_from_the_search_to_its_confirmation() -> None:
    table = LiveTable(Console(file=io.StringIO(), width=80))
    table.on_progress(make_progress(run="first"), None)
    table.on_confirmation(make_confirmation(), None)
    assert "0 of 4 runs on fresh seeds" in show(table._render())


def test_plain_lines_tell_the_plan_and_each_run_that_ended() -> None:
    stream = io.StringIO()
    lines = PlainLines(Console(file=stream, width=80))
    lines.on_confirmation(make_confirmation(), None)
    lines.on_confirmation(make_confirmation(*CONFIRMED[:1]), CONFIRMED[0])
    lines.on_confirmation(make_confirmation(*CONFIRMED[:1]), None)
    lines.on_confirmation(make_confirmation(*CONFIRMED), CONFIRMED[2])
    assert stream.getvalue().splitlines() == [
        "confirming 2 configurations on seeds 1000, 1001: 4 runs",
        f"[confirm 1/4] {NAME}[/]  seed 1000  completed  val_accuracy 97.00%",
        "confirming 2 configurations on seeds 1000, 1001: 4 runs, 1 of them already done",
        "[confirm 3/4] default  seed 1000  diverged  diverged: weights are not finite",
    ]


def test_json_lines_tell_each_run_and_the_result_what_was_confirmed() -> None:
    stream = io.StringIO()
    observer = JsonLines(stream)
    observer.on_confirmation(make_confirmation(), None)
    observer.on_confirmation(make_confirmation(*CONFIRMED), CONFIRMED[2])
    [event] = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (event["event"], event["trial_id"], event["seed"]) == ("confirmed_run", DEFAULT_ID, 1000)
    assert (event["status"], event["val_accuracy"], event["test_recalls"]) == ("diverged", None, [])

    runs = [*CONFIRMED[:2], make_confirmed("a", 1002, 0.975)]
    runs += [make_confirmed(DEFAULT_ID, seed, value) for seed, value in ((1000, 0.90), (1001, 0.92), (1002, 0.91))]
    default = make_trial(DEFAULT_ID, config=TrialConfig(), epochs=())
    result = ConfirmResult(
        rows=rank_confirmed([make_scored("a", 0.99)], default, runs, ["val_accuracy"]),
        runs=runs,
        progress=make_confirmation(*runs),
        left_out=None,
        seconds=1.5,
    )
    found = describe_confirmation_as_json(result)
    observer.write("result", found)  # JSON can hold it
    assert [(row["rank"], row["trial_id"]) for row in found["confirmed"]] == [(1, "a"), (2, DEFAULT_ID)]
    assert found["confirmed"][0]["val_accuracy_mean"] == pytest.approx(0.975)
    verdict = found["verdict"]
    assert (verdict["recommended"], verdict["verdict_kind"]) == ("a", "better")
    assert verdict["gain"] == pytest.approx(0.065)
    assert verdict["verdict"].startswith("rank 1 is better than the defaults: +6.50 points")
    assert (found["seconds"], found["interrupted"]) == (1.5, False)
