"""The cost of telemetry in a user's own loop: steps with ``TelemetryScaler`` beside the same steps with GradScaler.

Both loops take turns of a few hundred milliseconds, each first in half of the pairs. The ratio is that of the two turns
of a pair: of CPU seconds on a CPU, which other programs hardly change, and of seconds on a GPU.
"""

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import machine_line
from benchmarks.markdown import judge, render_table
from benchmarks.training.floor import one_thread
from tune_amp.training.models import simple_net
from tune_amp.training.own_trial import TelemetryScaler
from tune_amp.trial.config import TrialConfig

MOST_OVERHEAD = 0.01
"""Target: share of the step time that recording may add."""
PAIRS = 36
TURN_SECONDS = 0.25
CONFIG = TrialConfig(precision="fp16")

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverheadRow:
    """One model and optimizer."""

    case: str
    step_seconds: float
    """Median time of a step with GradScaler."""
    overhead: float
    """Median over the pairs of the relative difference of a step's time."""
    low: float
    """Lower end of its 95 % interval (bootstrap over the pairs)."""
    high: float


def measure_overhead(device: torch.device, pairs: int = PAIRS) -> list[OverheadRow]:
    """Time steps of the tutorial's net, the smallest that anybody tunes, and of a layer of 1,024 units."""
    cases: Mapping[str, tuple[Callable[[], nn.Module], int]] = {
        "784-256-10, batch 64": (lambda: simple_net((1, 28, 28), 10), 64),
        "784-256-10, batch 512": (lambda: simple_net((1, 28, 28), 10), 512),
        "784-1024-1024-10, batch 64": (_wide_net, 64),
    }
    with one_thread(device):
        return [
            _compare(f"{name}, Adam{' fused' if fused else ''}", build, batch_size, fused, device, pairs)
            for name, (build, batch_size) in cases.items()
            for fused in (False, True)
        ]


def render_overhead(rows: list[OverheadRow], device: torch.device) -> str:
    """Return the table in Markdown."""
    cells = [
        (
            row.case,
            f"{1e6 * row.step_seconds:,.0f} us",
            f"{100 * row.overhead:+.2f} % ({100 * row.low:+.2f} to {100 * row.high:+.2f})",
            judge(row.overhead <= MOST_OVERHEAD),
        )
        for row in rows
    ]
    title = "# Telemetry of a user's own loop\n\n" + (__doc__ or "").replace("``", "`")
    table = render_table(
        ("model and optimizer", "step with GradScaler", "added by recording (95 %)", "target 1 %"), cells
    )
    return f"{title}\nfp16, {device.type}, one thread. {machine_line(device)}\n\n{table}\n"


def _wide_net() -> nn.Module:
    sizes = (784, 1024, 1024, 10)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def _compare(
    case: str, build: Callable[[], nn.Module], batch_size: int, fused: bool, device: torch.device, pairs: int
) -> OverheadRow:
    scalers: list[torch.amp.GradScaler] = [torch.amp.GradScaler(device.type), TelemetryScaler(CONFIG, device)]
    steps = [_prepare(scaler, build().to(device), batch_size, fused, device) for scaler in scalers]
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    count = max(1, int(TURN_SECONDS / min(_time(step, 20, clock) for step in steps)))
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        order = (0, 1) if pair % 2 else (1, 0)
        taken = {}
        for which in order:
            taken[which] = _time(steps[which], count, clock)
        times.append((taken[0], taken[1]))
    differences = np.array([ours / plain - 1 for plain, ours in times])
    draws = np.random.default_rng(0).choice(differences, (_RESAMPLES, pairs))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return OverheadRow(
        case=case,
        step_seconds=statistics.median(plain for plain, _ in times),
        overhead=float(np.median(differences)),
        low=float(low),
        high=float(high),
    )


def _prepare(
    scaler: torch.amp.GradScaler, model: nn.Module, batch_size: int, fused: bool, device: torch.device
) -> Callable[[int], None]:
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    images: Tensor = torch.rand(batch_size, 1, 28, 28, device=device)
    labels = torch.randint(10, (batch_size,), device=device)

    def take(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if isinstance(scaler, TelemetryScaler):
            scaler.read()  # once an epoch: its time counts
        if device.type == "cuda":
            torch.cuda.synchronize()

    return take


def _time(take: Callable[[int], None], count: int, clock: Callable[[], float]) -> float:
    """Return the seconds of a step."""
    gc.collect()
    started = clock()
    take(count)
    return (clock() - started) / count
