import os

import pytest
import torch

from tune_amp.cluster.memory_holders import (
    MemoryHeldError,
    find_gpu_holders,
    find_node_holders,
    naming_memory_holders,
)

GIB = 2**30


def word_kill(used: float, workers: dict[int, float], users: str) -> str:
    """The error of ray 2.60.0 for workers that its memory monitor killed, without what nobody reads."""
    killed = "".join(
        f"Selected to kill: (Task: job ID=01000000, lease ID=00f1, task name=AmpTrainable.__init__, required resources="
        f"{{CPU_group_47f1: 1}}, pid={pid}, actual memory used={size:.2f}GB, worker ID=9fac)\n"
        for pid, size in workers.items()
    )
    return (
        f"{len(workers)} worker(s) were killed due to the node running low on memory. Memory on the node (IP: ::1,"
        f" ID: ef64) was {used:.2f}GB used / 23.54GB limit (0.062821)\n"
        f"OOM kill reason: Memory usage {int(used * GIB)}B exceeded threshold of 505521184B (2.0% of 2527600B limit)\n"
        f"Object store memory usage: [- objects spillable: 0\n- bytes spillable: 0\n]\n"
        f"Ray killed {len(workers)} worker(s) based on the killing policy\nConsidered workers: [\n{killed}]\n"
        f"Total non-selected idle workers: 0\nTotal non-selected idle workers USS bytes: 0.00GB\n"
        f"Top 10 memory users: PID\tMEM(GB)\tCOMMAND\n{users}"
        "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/.\n"
    )


OURS = "DRIVER\t9.00\tpython search.py\n13812\t4.48\tray::AmpTrainable 01-fp16 epoch 1/3\n"
THEIRS = "77\t3\t/usr/bin/python /home/she/train.py --token s3cret\n"


@pytest.mark.parametrize(
    ("used", "workers", "users", "expected"),
    [
        (20.0, {13812: 4.48}, OURS + THEIRS, "15.52 of 20.00 GiB; the largest is process 77 (python train.py, 3 GiB)"),
        (20.0, {13812: 4.48, 9: 5.0}, OURS, "10.52 of 20.00 GiB"),
        (20.0, {13812: 5.0, 9: 5.0}, OURS + THEIRS, None),
        (20.0, {}, OURS + THEIRS, None),  # no worker of ours: not the words that we know
        (
            6.0,
            {1: 0.5},
            "7\t3\tpython -m pytest -x\n",
            "5.50 of 6.00 GiB; the largest is process 7 (python -m pytest, 3 GiB)",
        ),
        (6.0, {1: 0.5}, "7\t3\t/bin/solve --key=s3cret\n", "5.50 of 6.00 GiB; the largest is process 7 (solve, 3 GiB)"),
    ],
)
def test_others_hold_a_nodes_memory_where_trials_hold_less_than_half(
    used: float, workers: dict[int, float], users: str, expected: str | None
) -> None:
    found = find_node_holders(word_kill(used, workers, users.replace("DRIVER", str(os.getpid()))))
    assert found == (expected and f"the node's memory is held by other programs: {expected}")


def test_another_death_of_a_worker_is_nobody_elses_fault() -> None:
    assert find_node_holders("The actor died unexpectedly before finishing this task.") is None


@pytest.mark.parametrize(
    ("free", "own", "share", "left"),
    [
        (1, 2, 1.0, "3.00 of the 80.00"),
        (1, 38, 1.0, "39.00 of the 80.00"),
        (1, 39, 1.0, None),  # half of what it was given
        (0, 78, 1.0, None),
        (1, 3, 0.25, "4.00 of the 20.00"),
        (1, 9, 0.25, None),
        (0, 9, 0.25, "9.00 of the 20.00"),
    ],
)
def test_others_hold_a_gpus_memory_where_a_trial_can_have_less_than_half_of_its_share(
    free: int, own: int, share: float, left: str | None
) -> None:
    found = find_gpu_holders(free=free * GIB, own=own * GIB, total=80 * GIB, share=share)
    text = f"they leave {left} GiB that the trial was given; nvidia-smi lists them"
    assert found == (left and f"the GPU's memory is held by other programs: {text}")


@pytest.mark.parametrize(
    ("error", "device", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "cuda", MemoryHeldError),
        (torch.AcceleratorError("CUDA error: out of memory"), "cuda", MemoryHeldError),
        (RuntimeError("no kernel"), "cuda", RuntimeError),
        (RuntimeError("CUDA out of memory"), "cpu", RuntimeError),
    ],
)
def test_gpu_that_others_fill_is_told_from_one_that_the_trial_fills(
    monkeypatch: pytest.MonkeyPatch, error: Exception, device: str, expected: type[Exception]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    for own, raised in ((2**30, expected), (60 * 2**30, type(error))):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, own=own: own)
        with pytest.raises(Exception) as caught, naming_memory_holders(torch.device(device), 1.0):  # noqa: PT011
            raise error
        assert type(caught.value) is raised
