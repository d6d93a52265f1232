"""The names of the files in a run folder, for whoever reads or writes one, with Ray and torch or without."""

TRIALS_FILE = "trials.parquet"
"""One row a trial."""
EPOCHS_FILE = "epochs.parquet"
"""One row a trial and epoch."""
BEST_FILE = "best.parquet"
"""The best, ranked."""
CONFIRM_FILE = "confirm.parquet"
"""The best on fresh seeds, one row a run."""
IMPORTANCE_FILE = "importance.parquet"
"""Which parameters mattered."""
SPACE_FILE = "space.yaml"
"""The search space as it was when the run was begun."""
JOURNAL_FILE = "reports.journal"
"""All that happened, an event a line: a run goes on from it."""
STUDY_FILE = "study.journal"
"""Optuna's study."""
REPORT_FILE = "report.html"
"""The page with pictures."""

RUN_FILES = (
    BEST_FILE,
    CONFIRM_FILE,
    TRIALS_FILE,
    EPOCHS_FILE,
    IMPORTANCE_FILE,
    SPACE_FILE,
    STUDY_FILE,
    JOURNAL_FILE,
    REPORT_FILE,
)
"""All, those first that a user asks for first."""
