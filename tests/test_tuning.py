import types
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial

from tune_amp.config import TrialConfig
from tune_amp.resources import TrialResources
from tune_amp.tuning import _prepare_next_attempt, name_trial


class FakeTrial:
    def __init__(self, tag: str, **config: Any) -> None:
        self.experiment_tag = tag
        self.config = vars(TrialConfig(**config))


@pytest.mark.parametrize(
    ("trial", "name"),
    [
        (
            FakeTrial("7_lr=0.003,batch_size=256", precision="fp16", lr=0.0031, batch_size=256, init_scale=4096.0),
            "07-fp16-lr0.0031-b256-scale2^12",
        ),
        (FakeTrial("123", lr=0.1, batch_size=64), "123-fp32-lr0.1-b64"),
        (FakeTrial("1", lr=1.234e-5, precision="bf16"), "01-bf16-lr1.2e-05-b64"),
    ],
)
def test_trial_is_named_by_number_and_settings(trial: FakeTrial, name: str) -> None:
    assert name_trial(trial) == name


@pytest.mark.parametrize(
    ("status", "cause", "allowed"),
    [
        (Trial.ERROR, "the actor's node was terminated unexpectedly: health check failed", 3),
        (Trial.ERROR, "The actor is dead because its worker process has died.", 2),
        (Trial.RUNNING, "the actor's node was terminated unexpectedly: health check failed", 2),  # it has ended
    ],
)
def test_lost_node_costs_a_trial_none_of_its_retries(status: str, cause: str, allowed: int, tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(f"Failure # 1 (occurred at now)\n{cause}\n")
    trial = types.SimpleNamespace(status=status, max_failures=2, error_file=str(tmp_path / "error.txt"))
    noted: list[Any] = []
    searcher: Any = types.SimpleNamespace(note_worker_death=noted.append)
    resources = TrialResources(cpus=1, gpus=0.0, max_concurrent=1, reason="")
    _prepare_next_attempt(searcher, resources, trial)
    assert trial.max_failures == allowed
    assert noted == [trial]
