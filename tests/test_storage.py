import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs  # type: ignore[import-untyped]

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


@pytest.mark.parametrize("place", ["/proc/nope", "/proc", "foo://bar", "file", "\0", "s3://bucket/a?nonsense=1"])
def test_a_place_that_cannot_be_written_is_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(InputError) as caught:
        prepare_storage(place, tmp_path / "run")
    assert str(caught.value).startswith(f"--storage-path: {place} cannot be written (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_each_part_of_a_search_has_a_place_and_the_last_one_tidies_all(tmp_path: Path, elsewhere: bool) -> None:
    folder = tmp_path / "run"
    place, name = (str(tmp_path / "place"), "run") if elsewhere else (None, "ray")
    places = [prepare_storage(place, folder)]
    Path(places[0].folder).mkdir(parents=True)
    for _ in range(2):
        known = [(storage.place, storage.name) for storage in places]
        places.append(prepare_storage(place, folder, earlier=known))
        Path(places[-1].folder).mkdir()
    assert [storage.name for storage in places] == [name, f"{name}-2", f"{name}-3"]
    kept = [Path(storage.folder) / "01-fp32" / "checkpoint_000000" for storage in places]
    for checkpoint in kept:
        checkpoint.mkdir(parents=True)
    places[-1].remove_checkpoints()
    assert [checkpoint.exists() for checkpoint in kept] == [False] * 3
    assert all(checkpoint.parent.exists() for checkpoint in kept)


def test_place_of_another_run_is_passed_over_and_left_alone(tmp_path: Path) -> None:
    """One that the search itself made before it told of it is taken for another's too."""
    for name in ("run", "run-2", "run-3"):
        (tmp_path / name / "01-fp32" / "checkpoint_000000").mkdir(parents=True)
    place = prepare_storage(str(tmp_path), Path("results/new")).place
    known = [(place, "run"), ("/somewhere/else", "run-2"), (None, "run-3")]
    storage = prepare_storage(str(tmp_path), Path("results/run"), earlier=known)
    assert (storage.name, storage.earlier) == ("run-4", ("run",))
    storage.remove_checkpoints()
    assert [path.parts[-3] for path in sorted(tmp_path.rglob("checkpoint_*"))] == ["run-2", "run-3"]


def test_search_that_was_cut_off_before_it_told_of_its_place_goes_on_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert prepare_storage(str(tmp_path), Path("results/run"), earlier=[]).name == "run-2"
    with pytest.raises(InputError, match="already holds a run run"):
        prepare_storage(str(tmp_path), Path("results/run"))


def test_only_checkpoints_are_removed_and_none_is_no_fault(tmp_path: Path) -> None:
    storage = prepare_storage(str(tmp_path), Path("results/run"))
    storage.remove_checkpoints()
    for name in ("01-fp16/checkpoint_000003/trial.pt", "01-fp16/params.json", "02-fp16/checkpoint_000001/trial.pt"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    storage.remove_checkpoints()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["run/01-fp16/params.json"]


def test_what_somebody_else_calls_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    """A run that somebody packed may name any folder as one of its places."""
    theirs = [
        tmp_path / "models" / name for name in ("gpt/checkpoint_000001", "checkpoint_1", "01-fp16/checkpoint_best")
    ]
    for path in theirs:
        path.mkdir(parents=True)
    known = [(str(tmp_path), "models")]
    prepare_storage(str(tmp_path), Path("results/run"), earlier=known).remove_checkpoints()
    assert all(path.exists() for path in theirs)


def test_checkpoints_of_another_run_to_which_a_link_leads_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other" / "ray" / "01-fp16-lr0.1" / "checkpoint_000003"
    other.mkdir(parents=True)
    ours = tmp_path / "run" / "ray"
    (ours / "02-fp16-lr0.1").mkdir(parents=True)
    (ours / "01-fp16-lr0.1").symlink_to(other.parent)
    (ours / "x").symlink_to(tmp_path / "other" / "ray")
    (ours / "02-fp16-lr0.1" / "checkpoint_000001").symlink_to(other)
    prepare_storage(None, tmp_path / "run", earlier=[(None, "ray")]).remove_checkpoints()
    assert other.exists()


# An object store


@pytest.fixture(scope="module")
def object_store() -> Iterator[Any]:
    """A server that speaks S3, with one bucket; its address for ``endpoint_override``."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    fs.S3FileSystem(
        access_key="any",
        secret_key="any",
        endpoint_override=address,
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    ).create_dir("bucket")
    yield address
    server.stop()


def object_url(address: str, place: str, *, user: str = "") -> str:
    return f"s3://{user}{place}?scheme=http&endpoint_override={address}&region=us-east-1"


def test_object_store_holds_checkpoints_until_they_are_removed(object_store: str, tmp_path: Path) -> None:
    storage = prepare_storage(object_url(object_store, "bucket/searches", user="any:any@"), tmp_path / "run")
    assert (storage.path, storage.name, storage.folder) == ("bucket/searches", "run", "bucket/searches/run")
    remote = pickle.loads(pickle.dumps(storage.filesystem))  # as a worker gets it
    kept, removed = (
        f"{storage.folder}/{name}" for name in ("01-fp16/params.json", "01-fp16/checkpoint_000002/trial.pt")
    )
    for path in (kept, removed):
        remote.create_dir(path.rpartition("/")[0], recursive=True)
        with remote.open_output_stream(path) as file:
            file.write(b"state")
    storage.remove_checkpoints()
    found = storage.filesystem.get_file_info(fs.FileSelector("bucket/searches", recursive=True))
    assert [entry.path for entry in found if entry.type is fs.FileType.File] == [kept]
    with pytest.raises(InputError, match=r"--storage-path: s3://\*\*\*@bucket/searches\?.* already holds a run run"):
        prepare_storage(object_url(object_store, "bucket/searches", user="any:any@"), tmp_path / "run")


def test_credentials_come_from_the_environment_where_the_url_has_none(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    storage = prepare_storage(object_url(object_store, "bucket/environment"), tmp_path / "run")
    assert b"very-secret" not in pickle.dumps(storage.filesystem)  # nor do Ray's files hold it


def test_bucket_that_is_missing_is_one_line_without_the_secret(object_store: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare_storage(object_url(object_store, "no-such-bucket/a", user="name:very-secret@"), tmp_path / "run")
    shown = object_url(object_store, "no-such-bucket/a", user="***@")
    assert str(caught.value).startswith(f"--storage-path: {shown} cannot be written (OSError: Bucket 'no-such-bucket'")
    assert "\n" not in str(caught.value)
