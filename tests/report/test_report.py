"""A report says what a run's Parquet files hold, whatever of them is there, and takes nothing for code."""

import base64
import dataclasses
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
from records import make_epoch, make_trial
from report_runs import (
    BF16,
    SPACE,
    make_outcome,
    make_outcomes,
    make_runs,
    write_full_run,
    write_nasty_run,
    write_own_run,
    write_run,
)

from tune_amp.cli.report import report_command
from tune_amp.cli.search import _write_report
from tune_amp.report.axes import objective_title
from tune_amp.report.figures import draw_confirmed, draw_epochs, draw_history, draw_utilisation
from tune_amp.report.report import build_report, write_report
from tune_amp.report.run import Run, list_pair, load_run
from tune_amp.report.sections import SECTIONS, describe_savings
from tune_amp.report.summary import list_reuse
from tune_amp.results.confirmed import DEFAULT_ID, Confirmation
from tune_amp.results.ranking import rank_confirmed
from tune_amp.results.records import BestRow, write_best, write_confirmed, write_trials
from tune_amp.results.utilisation import describe_utilisation, find_shares, utilisation
from tune_amp.trial.config import InputError, TrialConfig, TrialStatus


def read_report(folder: Path) -> str:
    """What a reader sees, every white space as one blank."""
    return read_text(content_of(load_run(folder)))


def content_of(run: Run) -> str:
    """What stands in the page between its head, with the library, and the script that draws."""
    return build_report(run).rpartition("<main>")[2].partition("</main>")[0]


def section_of(folder: Path, anchor: str) -> str:
    [inner] = re.findall(f'<section id="{anchor}".*?</section>', content_of(load_run(folder)), re.DOTALL)
    return read_text(inner)


def read_text(page: str) -> str:
    text = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


# ---- the command ----


def test_the_command_writes_the_report_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert report_command([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert report_command([str(tmp_path / "trials.parquet"), "--output", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "report.html").read_bytes()


@pytest.mark.parametrize("name", ["report.html", "reports.journal", "folder", "link.html"])
def test_only_an_earlier_report_is_replaced(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert report_command([str(tmp_path), "--output", str(tmp_path / "earlier.html")]) == 0
    before = (tmp_path / "earlier.html").read_bytes()
    assert report_command([str(tmp_path), "--output", str(tmp_path / "earlier.html")]) == 0
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "link.html":
        path.symlink_to("earlier.html")
    else:
        path.write_text("mine")
    capsys.readouterr()
    assert report_command([str(tmp_path), "--output", str(path)]) == 2
    expected = f"error: {path}: already exists and is no report of tune_amp: remove it, or name another --output\n"
    assert capsys.readouterr().err == expected
    assert path.is_dir() or path.is_symlink() or path.read_text() == "mine"
    assert (tmp_path / "earlier.html").read_bytes() == before


def test_a_folder_without_trials_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / "trials.parquet").unlink()
    assert report_command([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: must hold trials.parquet\n"
    assert not (tmp_path / "report.html").exists()


def test_damaged_trials_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "trials.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"trials\.parquet: must be a readable"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert report_command([str(tmp_path), "--output", str(tmp_path / "nowhere" / "x.html")]) == 2
    assert "x.html: cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_search_whose_report_fails_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_report(tmp_path)  # there is nothing to report on
    expected = f"report.html was not written: InputError: {tmp_path}: must hold trials.parquet\n"
    assert capsys.readouterr().err == expected


def test_a_report_needs_no_torch_ray_or_journal(tmp_path: Path) -> None:
    write_full_run(tmp_path)
    code = (
        "import sys; from tune_amp.report.report import write_report; write_report(sys.argv[1])\n"
        "print(sorted({'torch', 'ray', 'duckdb', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert 1_800_000 < (tmp_path / "report.html").stat().st_size < 2_000_000


# ---- what it says ----


def test_the_first_screen_tells_what_was_searched_and_an_unconfirmed_winner(tmp_path: Path) -> None:
    text = read_report(write_run(tmp_path))
    assert "simple_net on mnist" in text
    assert "lr, batch_size, precision, init_scale, growth_interval" in text
    assert "55,000 training and 5,000 validation images" in text
    assert "sampler tpe, scheduler asha" in text
    assert "9 of up to 4 epochs each 3 completed 2 stopped 1 diverged 1 out of memory 1 failed 1 interrupted" in text
    assert "What came out Not confirmed on fresh seeds 97.60% validation accuracy of rank 1, from the search's" in text
    assert "Ranks 1 to 2 are indistinguishable on 5,000 validation images" in text
    assert "Among the best trials of one seed, the order is mostly noise" in text
    assert f"python scripts/train.py {tmp_path / 'best.parquet'}" in text


def test_a_single_trial_was_not_chosen_among_others(tmp_path: Path) -> None:
    text = read_report(write_run(tmp_path, [make_outcome(1, TrialStatus.COMPLETED, 0.9, 4)]))
    assert "other seeds will differ. Train it again" in text


def test_a_confirmed_winner_is_shown_with_interval_difference_ties_and_gain(tmp_path: Path) -> None:
    text = read_report(write_full_run(tmp_path))
    assert "Rank 1: test accuracy 97.30% [96.80%, 97.80%], mean of 3 fresh seeds, 95% interval." in text
    assert "Rank 1: validation accuracy 97.10% [96.60%, 97.60%], mean of 3 fresh seeds, 95% interval." in text
    assert "Search minus confirmed: +0.50 points." in text
    assert "A tie: any of rank 1 and rank 2 may be the best (paired t tests" in text
    verdict = (
        "What came out Rank 1 is better than the defaults +0.50 points of validation accuracy (95 % interval +0.25 to "
        "+0.75, 3 seeds) rank 1 lr 0.003, batch_size 512, precision fp16, init_scale 2^16, growth_interval 503 "
        "rank 3 (default) lr 0.001, batch_size 64, precision fp16, init_scale 2^16, growth_interval 2000"
    )
    assert text.count(verdict) == 1
    assert "Not confirmed" not in text


def test_single_runs_that_are_missing_are_named_and_the_verdict_stays(tmp_path: Path) -> None:
    write_full_run(tmp_path)
    (tmp_path / "confirm.parquet").unlink()
    text = read_report(tmp_path)
    assert "Rank 1 is better than the defaults +0.50 points" in text
    assert "Single runs are not shown: confirm.parquet is missing." in text


@pytest.mark.parametrize(
    ("failed", "said"),
    [
        ((2, 3), "Which may be the best is not known: not all runs completed."),
        ((2,), "Rank 1 is better than every other confirmed configuration whose runs all completed (paired"),
        ((), "Rank 1 is better than every other confirmed configuration (paired"),
    ],
)
def test_a_configuration_with_a_failed_run_is_neither_tied_nor_worse(
    failed: Sequence[int], said: str, tmp_path: Path
) -> None:
    run = load_run(write_full_run(tmp_path))
    rows = [run.ranked[0], *(make_other(row, failed=row.rank in failed) for row in run.rows if row.rank != 1)]
    write_best(tmp_path, rows, run.provenance)
    assert said in read_report(tmp_path)


def make_other(row: BestRow, *, failed: bool) -> BestRow:
    assert row.confirmation is not None
    if not failed:
        return dataclasses.replace(row, confirmation=dataclasses.replace(row.confirmation, tied_with_best=False))
    none = Confirmation(confirm_seeds=row.confirmation.confirm_seeds, confirm_failures=("seed 101: diverged",))
    return dataclasses.replace(row, confirmation=none)


def test_a_default_that_is_recommended_is_shown_and_reused_as_rank_1(tmp_path: Path) -> None:
    """It was no trial: no ring and no thick line marks it in the figures of trials, and none is promised."""
    run = load_run(write_full_run(tmp_path))
    assert run.default is not None
    promises = ("; the thick one is rank 1.", "; the ring is rank 1.")
    assert all(promise in read_report(tmp_path) for promise in promises)
    default = run.default.trial
    trials = [row.trial for row in run.ranked if row.trial.trial_id != DEFAULT_ID]
    runs = [*make_runs(default, 1), *make_runs(trials[0], 2), *make_runs(trials[1], DEFAULT_ID)]
    write_best(tmp_path, rank_confirmed(trials, default, runs, ["val_accuracy"]), run.provenance)
    write_confirmed(tmp_path, runs, run.provenance)
    text = read_report(tmp_path)
    assert "Rank 1 (default): test accuracy 97.30% [96.80%, 97.80%], mean of 3 fresh seeds" in text
    assert "No gain over the defaults Keep them; rank 2 is indistinguishable from them: -0.07 points" in text
    assert "A tie: any of rank 1 (default) and rank 2 may be the best" in text
    settings = "rank 1 (default) lr 0.001, batch_size 64, precision fp16, init_scale 2^16, growth_interval 2000"
    assert text.count(settings) == 1
    assert f"python scripts/train.py {tmp_path / 'best.parquet'}" in text
    assert not any(promise in text for promise in promises)


def test_a_confirmed_table_names_every_configuration(tmp_path: Path) -> None:
    text = section_of(write_full_run(tmp_path), "best")
    lines = (
        "rank 1 rank 2 rank 3 (default)",
        "test accuracy 97.30% [96.80%, 97.80%] 97.23% [96.72%, 97.75%] 96.80% [96.14%, 97.46%]",
        "validation accuracy 97.10% [96.60%, 97.60%] 97.03% [96.52%, 97.55%] 96.60% [95.94%, 97.26%]",
        "fresh seeds 3 3 3",
        "may be the best yes yes no",
        "search minus confirmed +0.50 points +0.07 points",
        "validation accuracy in the search 97.60% 97.10%",
        "validation loss in the search 0.1000 0.03750",
        "epochs in the search 4/4 4/4",
        "lr 0.003 0.008 0.001",
    )
    assert " ".join(lines) in text


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("scripts/search.py", "--seed", "7"), "python scripts/train.py RUN/best.parquet"),
        (("tune-amp search", "quick"), "tune-amp train RUN/best.parquet"),
        (("scripts/search.py", "--data-dir", "my data"), "python scripts/train.py RUN/best.parquet --data-dir|my data"),
        (("tune-amp search", "--data-dir=mnist"), "tune-amp train RUN/best.parquet --data-dir mnist"),
        ((), "python scripts/train.py RUN/best.parquet"),
    ],
)
def test_the_line_that_reuses_the_winner_has_the_same_data(
    command: Sequence[str], expected: str, tmp_path: Path
) -> None:
    run = load_run(write_run(tmp_path, command=command))
    words = [word for part in expected.split("|") for word in (part.split() if part != "my data" else [part])]
    assert list_reuse(run) == [word.replace("RUN", str(tmp_path)) for word in words]


def test_the_line_that_reuses_the_winner_consents_to_the_users_code(tmp_path: Path) -> None:
    config = TrialConfig(model="mine:net", dataset="mine:data")
    run = load_run(write_run(tmp_path, [make_trial(config=config)]))
    assert list_reuse(run)[3:] == ["--model", "mine:net", "--dataset", "mine:data"]


def test_what_early_stopping_saved_is_counted_in_epochs(tmp_path: Path) -> None:
    # 4 + 1 + 4 + 2 + 0 + 2 + 0 + 4 + 3 of 9 * 4; the two that were stopped took 1.75 s an epoch, and had 3 and 2 left.
    run = load_run(write_run(tmp_path))
    assert describe_savings(run) == (
        "9 trials trained 20 epochs of the 36 that all would have taken at full budget, 44% less. Not trained: 5 "
        "epochs (stopped), 2 epochs (diverged), 4 epochs (out of memory), 4 epochs (failed), 1 epoch (interrupted). "
        "At their own pace, stopped trials would have taken 8.8 s more of slot time."
    )


def test_a_bar_of_the_epochs_stands_for_several_where_there_are_many(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))
    lengths = {1: TrialStatus.STOPPED, 5: TrialStatus.STOPPED, 6: TrialStatus.DIVERGED, 1000: TrialStatus.COMPLETED}
    trials = tuple(
        make_trial(str(length), status=status, epochs=(make_epoch(length),)) for length, status in lengths.items()
    )
    bars = {
        bar.name: dict(zip(bar.x, bar.y, strict=True))
        for bar in draw_epochs(dataclasses.replace(run, trials=trials)).data
    }
    assert {len(bar) for bar in bars.values()} == {200}
    assert (bars["stopped here"][5], bars["continued"][5]) == (2, 2)
    assert (bars["diverged here"][10], bars["continued"][10]) == (1, 1)
    assert (bars["completed here"][1000], bars["continued"][1000]) == (1, 0)


def test_use_of_the_slots_is_told_and_drawn(tmp_path: Path) -> None:
    run = load_run(write_full_run(tmp_path))
    assert run.slot_time is not None
    line = describe_utilisation(run.trials, run.slot_time)
    shares = find_shares(utilisation(run.trials, run.slot_time))
    assert f"{line}. All bars together are" in section_of(tmp_path, "time")
    assert len(shares) == 5
    [bars] = draw_utilisation(shares).data
    assert dict(zip(bars.y, bars.x, strict=True)) == {use: 100 * share for use, share in shares.items()}
    assert bars.text == tuple(f"{share:.1%}" for share in shares.values())
    assert len(set(bars.marker.color)) == 5


def test_importance_is_told_with_what_noise_reaches(tmp_path: Path) -> None:
    write_full_run(tmp_path)
    text = section_of(tmp_path, "importance")
    assert "Importance for val_accuracy at epoch 1 (16 trials), and what permuted values reach in 5 %." in text
    assert "PED-ANOVA." in text


def test_where_it_comes_from_is_told_in_full(tmp_path: Path) -> None:
    text = section_of(write_full_run(tmp_path), "origin")
    for part in ("sha256:0123", "ray 2.60.0, torch 2.15.0", "scripts/search.py --seed 7", " ".join(SPACE.split())):
        assert part in text


@pytest.mark.parametrize(
    ("given", "typed"),
    [
        (("tune-amp search", "quick", "--name", "my run"), "tune-amp search quick --name 'my run'"),
        (("scripts/search.py", "--seed", "7"), "python scripts/search.py --seed 7"),
        (("my scripts/search.py",), "python 'my scripts/search.py'"),
    ],
)
def test_the_command_is_shown_as_it_is_typed(given: Sequence[str], typed: str, tmp_path: Path) -> None:
    assert f"Command {typed} Search space" in section_of(write_run(tmp_path, command=given), "origin")


def test_a_long_tail_is_told_beside_the_data(tmp_path: Path) -> None:
    assert "long tail" not in read_report(write_run(tmp_path))
    trial = make_trial(config=TrialConfig(imbalance=100.0))
    assert "5,000 validation images, long tail 100:1 objective highest val_accuracy" in read_report(
        write_run(tmp_path, [trial])
    )


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ("asha", "stopped by the scheduler at one of its rungs, or for another reason. Whether"),
        ("median", "stopped by the scheduler for doing worse than the median of the others, or for another"),
        ("none", "(completed), or for another reason."),
    ],
)
def test_trials_are_stopped_in_the_schedulers_own_way(scheduler: str, said: str, tmp_path: Path) -> None:
    text = section_of(write_run(tmp_path, scheduler=scheduler), "epochs")
    assert said in text
    assert ("rungs" in text) == (scheduler == "asha")


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_the_diamonds_distance_is_search_minus_confirmed(objective: str, tmp_path: Path) -> None:
    run = load_run(write_full_run(tmp_path, objective=objective))
    assert "distance from the grey dot is search minus confirmed" in section_of(tmp_path, "best")
    traces = {trace.name: trace for trace in draw_confirmed(run).data}
    grey, diamonds = traces[f"{objective_title(objective)}: mean, 95% interval"], traces["in the search"]
    means = dict(zip(grey.y, grey.x, strict=True))
    drawn = [value - means[place] for place, value in zip(diamonds.y, diamonds.x, strict=True)]
    found = [row.confirmation.optimism for row in run.rows if row.confirmation and not row.is_default]
    assert drawn == pytest.approx(found)


@pytest.mark.parametrize("epochs", [3, 4])
def test_the_difference_of_winners_that_ended_early_says_of_which_epoch(epochs: int, tmp_path: Path) -> None:
    trials = [make_outcome(1, TrialStatus.STOPPED, 0.976, epochs), make_outcome(2, TrialStatus.COMPLETED, 0.96, 4)]
    text = section_of(write_full_run(tmp_path, trials), "best")
    assert ("is that of the epoch that they had reached" in text) == (epochs == 3)


# ---- the user's own training ----


def test_a_users_own_metric_and_parameters_are_shown_like_others(tmp_path: Path) -> None:
    write_own_run(tmp_path, "val_f1", [0.5, 0.75, 0.625])
    text = read_report(tmp_path)
    assert text.startswith("mine:train tune_amp, run")
    assert "search_spaces/mnist_amp.yaml: lr, own.hidden, own.kind" in text
    assert "data read by the training loop itself objective highest val_f1" in text
    assert "Rank 1 is better than the defaults +2 in val_f1" in text
    assert "rank 1 lr 0.003, precision fp16, own.hidden 64, own.kind <b>wide</b>" in text
    assert "Rank 1: test_f1 4.020 [3.995, 4.045], mean of 3 fresh seeds" in text
    assert "trial status epochs val_f1 skipped steps training" in text
    assert "own.hidden 64 128 64" in section_of(tmp_path, "best")
    for word in ("accuracy", "images", "in fp32", "sha256"):
        assert word not in text


def test_the_only_kind_of_mark_is_explained_too(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, [make_trial(status=TrialStatus.DIVERGED)]))
    assert draw_history(run).layout.showlegend


@pytest.mark.parametrize(("objective", "first"), [("reward:max", 12.0), ("val_gap:min", -3.0), ("val_loss:min", -3.0)])
def test_a_metric_of_any_direction_and_sign_is_reported(objective: str, first: float, tmp_path: Path) -> None:
    run = load_run(write_own_run(tmp_path, objective, [-3.0, 0.0, 12.0, None]))
    line = draw_history(run).data[0]
    assert line.name == "best so far"
    assert line.y[-1] == first
    assert f"{first:.4g}" in section_of(tmp_path, "best")


@pytest.mark.parametrize(
    ("objective", "tested", "pair"),
    [
        ("val_f1", True, ["test_f1", "val_f1"]),
        ("val_f1", False, ["val_f1"]),
        ("eval_f1", True, ["eval_f1"]),
        ("reward:max", True, ["reward"]),
    ],
)
def test_a_metric_of_the_test_set_is_shown_if_it_was_measured(
    objective: str, tested: bool, pair: list[str], tmp_path: Path
) -> None:
    run = load_run(write_own_run(tmp_path, objective, [0.5, 0.75]))
    if not tested:
        runs = [dataclasses.replace(one, metrics={"val_f1": one.metrics["val_f1"]}) for one in run.confirmed]
        write_confirmed(tmp_path, runs, run.provenance)
        default = run.default.trial if run.default else None
        ranked = [row.trial for row in run.rows if not row.is_default]
        write_best(tmp_path, rank_confirmed(ranked, default, runs, run.provenance.objectives), run.provenance)
    assert list_pair(load_run(tmp_path)) == pair
    assert ("which each run measured once" in section_of(tmp_path, "best")) == (len(pair) == 2)


def test_own_parameters_that_differ_are_found_without_the_space(tmp_path: Path) -> None:
    write_own_run(tmp_path, "val_f1", [0.5, 0.75])
    run = load_run(tmp_path)
    write_trials(tmp_path, run.trials, dataclasses.replace(run.provenance, space_text="parameters: {unknown: 1}\n"))
    assert [parameter.name for parameter in load_run(tmp_path).parameters] == ["lr", "own.hidden", "own.kind"]


def test_an_own_accuracy_on_an_unknown_number_of_examples_is_reported(tmp_path: Path) -> None:
    write_own_run(tmp_path, "val_accuracy", [0.5, 0.75])
    for name in ("best", "confirm"):
        (tmp_path / f"{name}.parquet").unlink()
    text = read_report(tmp_path)
    assert "75.00% validation accuracy of rank 1, from the search's one seed" in text
    assert " images" not in text


# ---- parts that are missing ----


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("damaged", [False, True], ids=["missing", "damaged"])
@pytest.mark.parametrize(
    ("name", "anchor", "said"),
    [
        ("importance", "importance", "Which settings mattered Not"),
        ("confirm", "best", "Single runs are not shown: confirm.parquet"),
        ("epochs", "scales", "The loss scales are in epochs.parquet, which"),
        ("epochs", "curves", "Only last epochs are shown: epochs.parquet"),
    ],
)
def test_a_section_without_its_file_says_so(name: str, anchor: str, said: str, damaged: bool, tmp_path: Path) -> None:
    path = write_full_run(tmp_path) / f"{name}.parquet"
    spoil(path) if damaged else path.unlink()
    text = section_of(tmp_path, anchor)
    assert said in text
    if damaged:
        assert "cannot be read (" in text
        assert f"{name}.parquet: " in section_of(tmp_path, "origin")


def test_a_search_that_was_killed_is_ranked_by_the_report(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "best.parquet").unlink()
    text = read_report(tmp_path)
    assert "97.60% validation accuracy of rank 1" in text
    assert "Ranked by this report: best.parquet is missing" in text
    assert "scripts/train.py" not in text


def test_a_space_that_cannot_be_read_gives_way_to_what_differs(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, space_text="parameters: {of_another_version: {low: 0, high: 1}}\n"))
    names = [parameter.name for parameter in run.parameters]
    assert names == ["lr", "batch_size", "precision", "growth_interval"]  # the scale is the same in all that have one
    assert "of_another_version" in content_of(run)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_run_without_a_result_says_why(count: int, tmp_path: Path) -> None:
    trials = [make_outcome(n, TrialStatus.FAILED, None, 0, error="it broke") for n in range(1, count + 1)]
    text = read_report(write_run(tmp_path, trials))
    assert "No trial produced a result." in text
    assert ("it broke" in text) == (count > 0)


def test_a_run_in_which_all_diverged_has_their_loss_scales(tmp_path: Path) -> None:
    trials = [make_outcome(n, TrialStatus.DIVERGED, None, 1) for n in (1, 3)]
    write_run(tmp_path, trials)
    assert "No trial produced a result." in read_report(tmp_path)
    assert "2 of 200 training steps overflowed" in section_of(tmp_path, "scales")


def test_a_run_without_fp16_has_a_sentence_instead_of_scales(tmp_path: Path) -> None:
    trials = [make_outcome(n, TrialStatus.COMPLETED, 0.9, 2) for n in BF16]
    text = section_of(write_run(tmp_path, trials), "scales")
    assert text == (
        "The loss scale of every trial No trial trained in fp16: only fp16 needs loss scaling, so there is no loss "
        "scale to show."
    )


def test_several_objectives_have_a_picture_of_the_pareto_set(tmp_path: Path) -> None:
    write_run(tmp_path, objective="val_accuracy,train_seconds", sampler="nsga2", scheduler="none")
    text = read_report(tmp_path)
    assert "val_accuracy against train_seconds" in text
    assert "no other trial is at least as good in all objectives and better in one" in text
    assert "The Pareto set of val_accuracy and train_seconds" in text
    assert "97.60% validation accuracy, the best of the Pareto set by it, from the search's one seed" in text
    assert "time in training steps in the search 6.00 s" in text


def test_200_trials_are_reported(tmp_path: Path) -> None:
    trials = [
        dataclasses.replace(trial, trial_id=f"{copy}-{trial.trial_id}")
        for copy in range(23)
        for trial in make_outcomes()
    ][:200]
    assert "200 of up to 4 epochs each" in read_report(write_run(tmp_path, trials))


# ---- nothing is taken for code ----


def unpack(page: str, name: str) -> str:
    [packed] = re.findall(f'<script type="text/plain" id="{name}">([^<]*)</script>', page)
    return gzip.decompress(base64.b85decode(packed.replace(",", "<"))).decode()


def test_every_text_of_a_file_is_escaped(tmp_path: Path) -> None:
    whole = build_report(load_run(write_nasty_run(tmp_path)))
    page = whole.rpartition("<main>")[2].partition("</main>")[0]
    assert "<script>window" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;window.hacked = 1&lt;/script&gt;") > 20
    # In a figure's data, what plotly shows as text must not be a tag for plotly either.
    data = str(json.loads(unpack(whole, "plots")))
    assert "&lt;script" in data
    assert re.findall("<(?!/?(?:b|br|sup|extra)>).{20}", data) == []


def test_the_policy_names_the_scripts_of_the_page_and_no_other(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path)).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in html.unescape(policy[1])
    scripts = [unpack(page, "library")]
    assert scripts == [get_plotlyjs()]
    scripts += re.findall(r"^<script>(.*?)</script>$", page, re.MULTILINE | re.DOTALL)
    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall("sha256-([^']+)'", html.unescape(policy[1])) == hashes


def test_every_link_leads_to_a_section(tmp_path: Path) -> None:
    page = content_of(load_run(write_full_run(tmp_path)))
    assert re.findall(r'<section id="([a-z]+)"', page) == [*SECTIONS, "origin"]
    assert re.findall(r'<a href="#([a-z]+)"', page) == [*SECTIONS, "origin"]


def test_a_perfect_accuracy_and_a_loss_of_0_have_a_place(tmp_path: Path) -> None:
    trial = make_trial(epochs=(make_epoch(1, val_accuracy=1.0, val_loss=0.0),))
    assert "100.00% validation accuracy of rank 1" in read_report(write_run(tmp_path, [trial]))
