"""A user's own images go through search, show and training unchanged: as four files in a folder, and as a function."""

import gzip
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_runs import make_split

from tune_amp.cli.main import main
from tune_amp.cluster.session import ray_session
from tune_amp.results.records import load_best, load_best_rows, load_confirmed, load_provenance, load_trials
from tune_amp.trial.config import TrialStatus

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_ray", "enter_folder")]

TRAIN_IMAGES, TEST_IMAGES = 2_400, 500
SEARCH = ("search", "quick", "--num-samples", "2", "--top-k", "1", "--max-epochs", "4", "--name", "own")
FUNCTION = """
import numpy as np
def data():
    with np.load("own.npz") as parts:
        return [parts[name] for name in ("train_images", "train_labels", "test_images", "test_labels")]
"""


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    with ray_session(num_cpus=2, run="test_own_data"):
        yield


def make_parts() -> dict[str, NDArray[np.uint8]]:
    """Ten classes of 28 x 28 pixels under noise: class c is bright in row c."""
    parts: dict[str, NDArray[np.uint8]] = {}
    for name, count, seed in (("train", TRAIN_IMAGES, 1), ("test", TEST_IMAGES, 2)):
        split = make_split(count, classes=10, seed=seed, side=28)
        parts |= {f"{name}_images": split.images[:, 0], f"{name}_labels": split.labels.astype(np.uint8)}
    return parts


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = b"".join(number.to_bytes(4, "big") for number in (0x800 + array.ndim, *array.shape))
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_files(folder: Path) -> None:
    folder.mkdir()
    parts = make_parts()
    for name, stem in (("train", "train"), ("test", "t10k")):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", parts[f"{name}_images"])
        write_idx(folder / f"{stem}-labels-idx1-ubyte", parts[f"{name}_labels"])  # either way will do


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What a command prints."""
    capsys.readouterr()
    code = main(list(arguments))
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return printed.out.splitlines()


def without_wrap_up(lines: list[str]) -> list[str]:
    """All but the time that the search took after its last trial, which no file tells."""
    return [re.sub(r"; then .* to wrap up$|(?<=^confirmed) in \d+ s", "", line) for line in lines]


def check_run(folder: Path, dataset: str) -> None:
    names = ["best.parquet", "confirm.parquet", "epochs.parquet", "report.html", "space.yaml", "trials.parquet"]
    assert [name for name in names if not (folder / name).exists()] == []
    trials = load_trials(folder)
    assert [trial.config.dataset for trial in trials] == [dataset] * 2
    best = [trial.last.val_accuracy for trial in trials if trial.last and trial.config == load_best(folder)]
    assert max(accuracy for accuracy in best if accuracy is not None) > 0.6  # chance is 0.1
    confirmation = load_best_rows(folder)[0].confirmation
    assert confirmation is not None
    assert len(confirmation.confirm_seeds) == 3
    assert {confirmed.status for confirmed in load_confirmed(folder)} == {TrialStatus.COMPLETED}
    provenance = load_provenance(folder)
    assert (provenance.train_images, provenance.validation_images) == (2_200, 200)


def check_training(folder: Path, lines: list[str]) -> None:
    [accuracy] = [float(line.split()[2].rstrip("%")) for line in lines if line.startswith("test accuracy")]
    assert accuracy > 60
    [output] = folder.glob("train-*")
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["train_images"], metrics["test_images"]) == (TRAIN_IMAGES, TEST_IMAGES)
    assert metrics["test_accuracy"] == pytest.approx(accuracy / 100, abs=5e-5)
    assert f"Test accuracy {accuracy:.2f} %" in (output / "card.md").read_text()


def test_four_files_in_a_folder_go_all_the_way(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_files(tmp_path / "my images")
    searched = run(capsys, *SEARCH, "--dataset", "fashion_mnist", "--data-dir", "my images")
    folder = Path("results", "own")
    check_run(folder, "fashion_mnist")

    # A run that is shown again ends, line by line, as the search itself did.
    shown = run(capsys, "show", "own")
    end = next(place for place, line in enumerate(searched) if line.startswith("2 trials"))
    assert len(searched) - end >= 8
    assert shown[4:] == without_wrap_up(searched[end:])
    assert shown[:2] == [
        "simple_net on fashion_mnist: 2,200 training and 200 validation images",
        "space      quick: lr, batch_size, init_scale",
    ]

    _, program, *arguments = shlex.split(shown[-1])
    assert (program, arguments[-2:]) == ("tune-amp", ["--data-dir", "my images"])
    check_training(folder, run(capsys, *arguments))


def test_a_function_goes_all_the_way_and_other_data_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parts = make_parts()
    np.savez(tmp_path / "own.npz", **parts)  # type: ignore[arg-type]  # numpy means keywords of any name
    (tmp_path / "own_images.py").write_text(FUNCTION)
    run(capsys, *SEARCH, "--dataset", "own_images:data")
    folder = Path("results", "own")
    check_run(folder, "own_images:data")
    reuse = shlex.split(run(capsys, "show", "own")[-1])[2:]
    assert reuse[-2:] == ["--dataset", "own_images:data"]
    check_training(folder, run(capsys, *reuse))

    np.savez(tmp_path / "own.npz", **parts | {"test_images": parts["test_images"] // 2})  # type: ignore[arg-type]
    assert main([*reuse, "--seed", "1"]) == 2
    assert "must hold the data that the search used" in capsys.readouterr().err
