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

from tune_amp.monitor import terminal as monitoring
from tune_amp.monitor.terminal import (
    JsonLines,
    LiveTable,
    PlainLines,
    Quiet,
    describe_as_json,
    describe_confirmation_as_json,
    describe_counts,
    describe_time,
    describe_trial,
    render_confirmation,
    render_importance,
    render_progress,
    render_ranking,
)
from tune_amp.results.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.results.importance import ImportanceResult, ParameterImportance
from tune_amp.results.progress import ConfirmJob, ConfirmProgress, ConfirmResult, SearchProgress
from tune_amp.results.ranking import describe_ties, rank_confirmed
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import TrialConfig, TrialStatus, format_scale

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
    assert [NAME, "99/100", "98.77%", "1235", "1.5e-07", "too", "high", "123456"] in words(text)
    assert ["08-fp32-lr0.1-b64", "0/5"] in words(text)
    best = f"best so far {NAME.replace('07', '05')} completed epoch 1 val_accuracy 98.76%"
    assert best in " ".join(text.split())
    assert "1 of 16 trials ended: 1 completed" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_live_view_shows_nan_as_nan() -> None:
    last = make_epoch(2, val_accuracy=NAN, train_loss=INF)
    text = show(render_progress(make_progress([make_trial("a", trial_name="t", epochs=(last,))], ["a"])))
    [row] = [line for line in words(text) if line[:1] == ["t"]]
    assert row[2:4] == ["nan%", "inf"]
    assert "none yet" in text


def test_live_view_before_the_first_trial_says_so() -> None:
    table = LiveTable(Console(file=io.StringIO(), width=80))
    assert "starting workers" in show(table._render())
    text = show(render_progress(make_progress()))
    assert "none yet" in text
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


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Quiet().on_progress(make_progress(), make_trial())
    assert capsys.readouterr() == ("", "")


# The ranking


def test_ranking_shows_every_number_within_80_columns() -> None:
    last = make_epoch(100, val_accuracy=1.0, val_loss=99.99987, skipped_steps=99999)
    ranked = [
        make_trial("a", config=WIDE, epochs=(last,), wall_seconds=3600.4),
        make_scored("b", 0.98765, 1234.5678, config=TrialConfig(lr=0.5, batch_size=64, max_epochs=5)),
    ]
    text = show(render_ranking(ranked))
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    _, first, second = words(text)
    assert first == [
        "1", "1.23e-04", "1024", "fp16", "2^-24", "2000", "100/100", "100.00%", "99.9999", "99999", "60m00s"
    ]  # fmt: skip
    assert second == ["2", "5.00e-01", "64", "fp32", "1/5", "98.77%", "1235", "1", "4s"]


def test_ranking_has_a_heading_for_each_column() -> None:
    heading = words(show(render_ranking([make_trial(config=WIDE)])))[0]
    assert {"lr", "batch", "precision", "scale", "interval", "accuracy", "loss", "skips", "time"} <= set(heading)


@pytest.mark.parametrize(
    ("accuracies", "beginning"),
    [
        ([0.97], "One seed on 5,000 validation images: other seeds will differ"),
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
    both = dataclasses.replace(PROVENANCE, objective="val_accuracy,train_seconds")
    sentence = describe_ties([make_scored("a", 0.9), make_scored("b", 0.8)], both)
    assert sentence.startswith("The Pareto set of val_accuracy and train_seconds:")


def test_ranking_shows_the_costs_that_were_objectives() -> None:
    last = make_epoch(2, peak_memory_bytes=3 * 2**20, train_seconds=12.34)
    ranked = [make_trial("a", epochs=(last,))]
    assert [cell in show(render_ranking(ranked)).split() for cell in ("12.3s", "3MiB")] == [False, False]
    for objective, cells in (("train_seconds", {"training", "12.3s"}), ("peak_memory_bytes", {"memory", "3MiB"})):
        assert cells <= set(show(render_ranking(ranked, ("val_accuracy", objective))).split())


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
    assert ["batch_size", "0.10", "0.30", "0.500", "cannot", "be", "told", "from", "noise"] in shown


def test_counts_list_each_status_that_occurs() -> None:
    statuses = ["completed"] * 5 + ["stopped"] * 2 + ["diverged", "out_of_memory", "failed", "interrupted"]
    trials = [make_trial(f"{number}", status=TrialStatus(status)) for number, status in enumerate(statuses)]
    expected = "11 trials: 5 completed, 2 stopped, 1 diverged, 1 out_of_memory, 1 failed, 1 interrupted"
    assert describe_counts(trials).plain == expected
    assert describe_counts([]).plain == "0 trials"


# The clock


@pytest.mark.parametrize(
    ("spent", "ended", "budget", "expected"),
    [
        (0.4, 0, None, "0s spent"),
        (59.6, 1, None, "1m00s spent"),  # from one trial, start-up and all, nothing follows
        (40, 4, None, "40s spent, about 2m00s left"),
        (40, 4, 100.0, "40s spent, about 1m00s left"),
        (40, 4, 30.0, "40s spent, about 0s left"),
        (40, 4, 1e6, "40s spent, about 2m00s left"),
        (160, 16, None, "2m40s spent, about 0s left"),
        (7200, 2, None, "120m00s spent, about 840m00s left"),
    ],
)
def test_time_left_is_estimated_from_the_second_trial_on(
    monkeypatch: pytest.MonkeyPatch, spent: float, ended: int, budget: float | None, expected: str
) -> None:
    monkeypatch.setattr(monitoring, "time", types.SimpleNamespace(monotonic=lambda: 1000.0 + spent))
    trials = [make_trial(f"{number}") for number in range(ended + 1)]
    progress = make_progress(trials, [f"{ended}"], started=1000.0, time_budget=budget)
    assert describe_time(progress) == expected


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
        run="quick-1", jobs=JOBS, names=names, total=4, done=len(runs), runs=runs, started=time.monotonic()
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
    lines.on_confirmation(make_confirmation(*CONFIRMED), CONFIRMED[2])
    assert stream.getvalue().splitlines() == [
        "confirming 2 configurations on seeds 1000, 1001: 4 runs",
        f"[confirm 1/4] {NAME}[/]  seed 1000  completed  val_accuracy 97.00%",
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

    runs = [*CONFIRMED[:2], make_confirmed(DEFAULT_ID, 1000, 0.90), make_confirmed(DEFAULT_ID, 1001, 0.92)]
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


def test_quiet_says_nothing_of_a_confirmation(capsys: pytest.CaptureFixture[str]) -> None:
    Quiet().on_confirmation(make_confirmation(*CONFIRMED), CONFIRMED[0])
    assert capsys.readouterr() == ("", "")
