"""The names of the files in a run folder, importable without Ray and torch."""

TRIALS_FILE = "trials.parquet"
"""One row a trial."""
EPOCHS_FILE = "epochs.parquet"
"""One row a trial and epoch."""
BEST_FILE = "best.parquet"
"""The best trials, ranked."""
CONFIRM_FILE = "confirm.parquet"
"""The best trials on fresh seeds, one row a run."""
IMPORTANCE_FILE = "importance.parquet"
"""Importance of the parameters."""
SPACE_FILE = "space.yaml"
"""The search space at the start of the run."""
JOURNAL_FILE = "reports.journal"
"""All events, one a line, from which a run resumes."""
STUDY_FILE = "study.journal"
"""Optuna's study."""
REPORT_FILE = "report.html"
"""The HTML page with figures."""

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
"""All files, in the order in which a user needs them."""
