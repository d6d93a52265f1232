"""What a search says as it begins."""

import pytest

from tune_amp.cli.search_output import describe_unfit
from tune_amp.cluster.resources import TrialResources


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (0.0, "fp16: mine:Net does not run here (E: no kernel): such trials are recorded as infeasible"),
        (0.5, "fp16: mine:Net does not run on this machine's CPU (E: no kernel); trials run on GPUs"),
    ],
)
def test_precision_that_does_not_run_on_this_cpu_concerns_trials_on_cpus_only(gpus: float, expected: str) -> None:
    resources = TrialResources(cpus=1, gpus=gpus, max_concurrent=1, reason="")
    assert describe_unfit("mine:Net", "fp16", "E: no kernel", resources) == expected
