"""Every overflow of every trial is in the picture of loss scales, at the step that was lost."""

from pathlib import Path

import numpy as np
import pytest
from records import make_epoch, make_trial
from report_runs import write_run

from tune_amp.report.run import load_run
from tune_amp.report.scales import MARK_COLUMNS, ScalePoint, Trajectory, _thin, draw_scales, trace_scale, trace_scales
from tune_amp.report.sections import build_scales
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import TrialConfig


def make_scaled(*epochs: tuple[tuple[int, ...], tuple[float, ...]], last: float, steps: int = 100) -> TrialRecord:
    """A trial of ``steps`` steps an epoch: of each epoch, where the scale changed and to what; then its last value."""
    ends = [values[0] for _, values in epochs[1:]] + [last]
    reports = [
        make_epoch(
            number,
            steps=steps * number,
            loss_scale_steps=changes,
            loss_scale_values=values,
            loss_scale=end,
        )
        for number, ((changes, values), end) in enumerate(zip(epochs, ends, strict=True), start=1)
    ]
    return make_trial(epochs=tuple(reports))


def test_an_overflow_is_the_step_before_the_scale_came_down() -> None:
    trial = make_scaled(((1, 2, 3, 51), (2.0**18, 2.0**17, 2.0**16, 2.0**17)), ((101,), (2.0**17,)), last=2.0**17)
    overflows = trace_scale(trial).overflows
    assert [(point.step, point.scale) for point in overflows] == [(1, 2.0**18), (2, 2.0**17)]  # the growth is none


def test_an_overflow_in_the_last_step_of_an_epoch_or_of_the_trial_counts() -> None:
    trial = make_scaled(((1,), (2.0**18,)), ((101,), (2.0**17,)), last=2.0**16)
    assert [point.step for point in trace_scale(trial).overflows] == [100, 200]


def test_steps_of_all_batch_sizes_have_their_place_in_epochs() -> None:
    small = make_scaled(((1, 51), (8.0, 4.0)), ((101,), (4.0,)), last=4.0, steps=100)
    large = make_scaled(((1, 6), (8.0, 4.0)), ((11,), (4.0,)), last=4.0, steps=10)
    places = [[point.epoch for point in trace_scale(trial).points] for trial in (small, large)]
    assert places == [[0.0, 0.5, 1.0, 2.0]] * 2


def test_a_trial_without_a_scale_has_no_trajectory(tmp_path: Path) -> None:
    trials = [
        make_trial(
            "a", config=TrialConfig(), epochs=(make_epoch(loss_scale=None, loss_scale_steps=(), loss_scale_values=()),)
        ),
        make_trial("b", epochs=()),
        make_trial("c"),
    ]
    run = load_run(write_run(tmp_path, trials))
    assert [trajectory.trial.trial_id for trajectory in trace_scales(run)] == ["c"]


def test_the_winner_is_drawn_last_and_the_panels_share_an_axis(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))
    first, whole = draw_scales(run, trace_scales(run))
    assert run.winner is not None
    for figure in (first, whole):
        lines = [trace for trace in figure.data if trace.mode == "lines"]
        assert lines[-1].meta[1] == run.winner.trial.trial_id
        assert lines[-1].line.width > lines[0].line.width
    assert first.layout.yaxis.range == whole.layout.yaxis.range


def test_marks_that_would_cover_each_other_are_counted() -> None:
    marks = [ScalePoint(step=step, epoch=step / 1000, scale=2.0**20) for step in range(4000)]
    thinned = _thin(Trajectory(trial=make_trial(), points=tuple(marks), overflows=tuple(marks)), 4.0)
    assert len(thinned.overflows) == MARK_COLUMNS
    assert sum(point.count for point in thinned.overflows) == 4000
    assert len(thinned.points) < 1000


def test_a_saw_tooth_keeps_its_extremes() -> None:
    rng = np.random.default_rng(0)
    points = [
        ScalePoint(step=step, epoch=step / 5000, scale=float(2.0 ** rng.integers(10, 30))) for step in range(5000)
    ]
    thinned = _thin(Trajectory(trial=make_trial(), points=tuple(points), overflows=()), 1.0).points
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]
    assert {point.scale for point in thinned} >= {2.0**10, 2.0**29}
    assert [point.step for point in thinned] == sorted(point.step for point in thinned)


@pytest.mark.parametrize("growth_interval", [1, 7])
def test_as_many_overflows_are_marked_as_steps_were_skipped(growth_interval: int) -> None:
    """In a real training with a scale that begins too high and grows again and again."""
    import torch
    from small_runs import make_split

    from tune_amp.training.run import TrainingRun
    from tune_amp.training.training_data import TrainingData

    data = TrainingData(make_split(240), make_split(30, seed=1), 3, torch.device("cpu"))
    config = TrialConfig(
        precision="fp16", init_scale=2.0**40, growth_interval=growth_interval, batch_size=4, max_epochs=3, lr=0.01
    )
    epochs = tuple(TrainingRun(config, data).epochs())
    trajectory = trace_scale(make_trial(config=config, epochs=epochs))
    assert epochs[-1].skipped_steps > 20
    assert len(trajectory.overflows) == epochs[-1].skipped_steps
    assert trajectory.points[-1].epoch == 3.0


def test_a_loop_that_never_updated_its_scaler_is_named_as_the_reason(tmp_path: Path) -> None:
    epochs = (make_epoch(loss_scale=None, loss_scale_steps=(), loss_scale_values=()),)
    run = load_run(write_run(tmp_path, [make_trial(config=TrialConfig(precision="fp16"), epochs=epochs)]))
    expected = "The training loop never called trial.scaler.update(), which records the loss scale."
    assert list(build_scales(run).texts) == [expected]
