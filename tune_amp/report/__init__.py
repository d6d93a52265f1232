"""One HTML file with pictures, made from a run's Parquet files alone."""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.report.report import write_report as write_report

__getattr__ = open_door(__name__, report=("write_report",))
