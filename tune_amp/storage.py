"""Where Ray keeps the checkpoints of a run: the run folder, or a place that all nodes of a cluster can write."""

import dataclasses
from pathlib import Path

from pyarrow import fs  # type: ignore[import-untyped]

from tune_amp.config import InputError, describe_error

RAY_FOLDER = "ray"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStorage:
    """The folder of Ray's experiment."""

    path: str
    """Path or URL above it, as Ray takes it."""
    name: str
    """Its name below ``path``."""
    filesystem: fs.FileSystem
    folder: str
    """The same place for ``filesystem``."""

    @property
    def root(self) -> str:
        """The folder above it, for ``filesystem``."""
        return self.folder.removesuffix(f"/{self.name}")

    def remove_checkpoints(self) -> None:
        """Delete the trials' checkpoints: they serve trials whose worker died, and add up to gigabytes."""
        trials = fs.FileSelector(self.folder, allow_not_found=True, recursive=True)
        for entry in self.filesystem.get_file_info(trials):
            if entry.type is fs.FileType.Directory and entry.base_name.startswith("checkpoint_"):
                self.filesystem.delete_dir(entry.path)


def prepare_storage(storage_path: str | None, run_folder: Path, *, nodes: int = 1, session: int = 1) -> RunStorage:
    """Find the place, and try that it can be written. Each time that a search goes on it has a new one.

    Args:
        storage_path: a path or URL that all nodes can write; None for the run folder, which only this node can.
        run_folder: the run's own folder; its name is the experiment's name at ``storage_path``.
        nodes: of the Ray cluster.
        session: 1 where the search begins, 2 where it goes on for the first time.

    Raises:
        InputError: the place cannot be written, holds a run of this name, or must be given and was not.
    """
    if storage_path is None:
        if nodes > 1:
            raise InputError(f"--storage-path: must name a place that all {nodes} nodes of the cluster can write")
        folder = run_folder.resolve()
        name = _name_session(RAY_FOLDER, session)
        return RunStorage(path=str(folder), name=name, filesystem=fs.LocalFileSystem(), folder=str(folder / name))
    name = _name_session(run_folder.name, session)
    try:
        place = storage_path if "://" in storage_path else str(Path(storage_path).expanduser().resolve())
        filesystem, root = fs.FileSystem.from_uri(place)
        filesystem.create_dir(root, recursive=True)
        taken = filesystem.get_file_info(f"{root}/{name}").type is not fs.FileType.NotFound
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"--storage-path: {storage_path} cannot be written ({describe_error(error)})") from error
    if taken:
        raise InputError(f"--storage-path: {storage_path} already holds a run {name}; choose another --name")
    return RunStorage(path=place, name=name, filesystem=filesystem, folder=f"{root}/{name}")


def _name_session(name: str, session: int) -> str:
    return name if session == 1 else f"{name}-{session}"
