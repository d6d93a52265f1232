"""Every path in the folder of a run, importable without Ray and torch."""

import dataclasses
from pathlib import Path

from tune_amp.trial.config import InputError


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of a run; it need not exist."""

    path: Path

    def table(self, kind: str) -> Path:
        """Return the path of the Parquet file of a kind."""
        return self.path / f"{kind}.parquet"

    @property
    def best(self) -> Path:
        """The best trials, ranked."""
        return self.table("best")

    @property
    def confirm(self) -> Path:
        """The best trials on fresh seeds, one row a run."""
        return self.table("confirm")

    @property
    def trials(self) -> Path:
        """One row a trial."""
        return self.table("trials")

    @property
    def epochs(self) -> Path:
        """One row a trial and epoch."""
        return self.table("epochs")

    @property
    def importance(self) -> Path:
        """Importance of the parameters."""
        return self.table("importance")

    @property
    def space(self) -> Path:
        """The search space at the start of the run."""
        return self.path / "space.yaml"

    @property
    def study(self) -> Path:
        """Optuna's study."""
        return self.path / "study.journal"

    @property
    def journal(self) -> Path:
        """All events, one a line, from which a run resumes."""
        return self.path / "reports.journal"

    @property
    def report(self) -> Path:
        """The HTML page with figures."""
        return self.path / "report.html"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, in the order in which a user needs them."""
        results = (self.best, self.confirm, self.trials, self.epochs, self.importance)
        return (*results, self.space, self.study, self.journal, self.report)


def locate(path: str | Path, *kinds: str) -> Path:
    """Return ``path`` itself if it is a file, else the first Parquet file of ``kinds`` in that run folder."""
    path = Path(path)
    candidates = [RunFolder(path).table(kind) for kind in kinds] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise InputError(f"{path}: must hold {' or '.join(candidate.name for candidate in candidates)}")
    raise InputError(f"{path}: must be a Parquet file or the folder of a run, but does not exist")
