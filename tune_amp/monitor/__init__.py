"""Observers of a search: terminal, Prometheus, trackers. None of them can stop it."""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.monitor.prometheus import Gauges as Gauges
    from tune_amp.monitor.terminal import JsonLines as JsonLines
    from tune_amp.monitor.terminal import LiveTable as LiveTable
    from tune_amp.monitor.trackers import build_trackers as build_trackers

__getattr__ = open_door(
    __name__, terminal=("LiveTable", "JsonLines"), prometheus=("Gauges",), trackers=("build_trackers",)
)
