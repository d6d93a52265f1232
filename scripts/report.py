"""Make the report of a run again from its Parquet files: ``python scripts/report.py --help``."""

import sys

from tune_amp.cli.report import report_command

if __name__ == "__main__":
    sys.exit(report_command())
