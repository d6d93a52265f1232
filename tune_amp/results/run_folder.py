"""Every path in the folder of a run, importable without Ray and torch."""

from pathlib import Path

from tune_amp.trial.config import InputError


class RunFolder:
    """The paths in the folder of a run; it need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = self.table("best")
        """The best trials, ranked."""
        self.confirm = self.table("confirm")
        """The best trials on fresh seeds, one row a run."""
        self.trials = self.table("trials")
        """One row a trial."""
        self.epochs = self.table("epochs")
        """One row a trial and epoch."""
        self.importance = self.table("importance")
        """Importance of the parameters."""
        self.space = path / "space.yaml"
        """The search space at the start of the run."""
        self.study = path / "study.journal"
        """Optuna's study."""
        self.journal = path / "reports.journal"
        """All events, one a line, from which a run resumes."""
        self.report = path / "report.html"
        """The HTML page with figures."""
        results = (self.best, self.confirm, self.trials, self.epochs, self.importance)
        self.files = (*results, self.space, self.study, self.journal, self.report)
        """All files, in the order in which a user needs them."""

    def table(self, kind: str) -> Path:
        """Return the path of the Parquet file of a kind."""
        return self.path / f"{kind}.parquet"


def locate(path: str | Path, *kinds: str) -> Path:
    """Return ``path`` itself if it is a file, else the first Parquet file of ``kinds`` in that run folder."""
    path = Path(path)
    candidates = [RunFolder(path).table(kind) for kind in kinds] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        why = ", which a search writes at its end if a trial produced a result" if kinds == ("best",) else ""
        raise InputError(f"{path}: must hold {' or '.join(candidate.name for candidate in candidates)}{why}")
    raise InputError(f"{path}: must be a Parquet file or the folder of a run, but does not exist")
