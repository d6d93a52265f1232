from pathlib import Path

import pytest

from tune_amp.config import InputError
from tune_amp.storage import prepare_storage


def test_checkpoints_go_into_the_run_folder_where_nothing_is_said(tmp_path: Path) -> None:
    storage = prepare_storage(None, tmp_path / "run")
    assert (storage.path, storage.name) == (str(tmp_path / "run"), "ray")


def test_several_nodes_need_a_place_that_all_can_write(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare_storage(None, tmp_path / "run", nodes=3)
    assert str(caught.value) == "--storage-path: must name a place that all 3 nodes of the cluster can write"
    assert prepare_storage(str(tmp_path), tmp_path / "run", nodes=3).path == str(tmp_path)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_place_is_made_and_named_after_the_run(tmp_path: Path, prefix: str) -> None:
    place = tmp_path / "not" / "there"
    storage = prepare_storage(f"{prefix}{place}", Path("results/run"))
    assert place.is_dir()
    assert (storage.name, storage.folder) == ("run", f"{place}/run")


def test_a_run_of_the_same_name_is_never_mixed_with(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError) as caught:
        prepare_storage(str(tmp_path), Path("results/run"))
    assert str(caught.value) == f"--storage-path: {tmp_path} already holds a run run; choose another --name"


@pytest.mark.parametrize("place", ["/proc/nope", "foo://bar", "file", "\0"])
def test_a_place_that_cannot_be_written_is_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(InputError) as caught:
        prepare_storage(place, tmp_path / "run")
    assert str(caught.value).startswith(f"--storage-path: {place} cannot be written (")
    assert "\n" not in str(caught.value)


def test_only_checkpoints_are_removed_and_none_is_no_fault(tmp_path: Path) -> None:
    storage = prepare_storage(str(tmp_path), Path("results/run"))
    storage.remove_checkpoints()
    for name in ("01-fp16/checkpoint_000003/trial.pt", "01-fp16/params.json", "02-fp16/checkpoint_000001/trial.pt"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    storage.remove_checkpoints()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["run/01-fp16/params.json"]
