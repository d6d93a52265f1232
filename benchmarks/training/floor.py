"""The least time that a training step can take on this machine, from rates measured in the same run.

A step's matrix products cannot be faster than the device multiplies, its bytes cannot move faster than the device
copies: the floor is the larger of ``FLOPs / rate`` and ``bytes / bandwidth`` (the roofline of Williams et al. 2009,
"Roofline: an insightful visual performance model"). FLOPs are counted by PyTorch's ``FlopCounterMode`` over forward and
backward pass; bytes are those that no program can leave out: weights, gradients and optimizer state, each read and
written once, and the batch, read once. Rate and bandwidth are the best of two measurements, one at a size that fills
the device and one at the step's own (what fits in a cache moves faster). Beside it stands the time that starting the
step's operations takes: so many kernels of a graph's replay on CUDA, so many calls of a small operation on the CPU.
"""

import contextlib
import dataclasses
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tune_amp.training.amp import AUTOCAST_DTYPES, fp32_arithmetic
from tune_amp.training.cuda_graph import Step, capture_cuda_graph
from tune_amp.training.data import Split
from tune_amp.training.generators import keep_generators
from tune_amp.training.models import InputShape, build_model
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialConfig

SECONDS = 0.05
"""Spent on one measurement, warm-up aside."""
BLOCKS = 5
"""The best of so many counts: what disturbs a measurement only makes it longer."""
COPIED_BYTES = 2**28
"""Beyond the caches of today's processors and GPUs."""
FIRST_SIDE, LAST_SIDE = 256, 8192
LONG_CALL_SECONDS = {"cpu": 0.03, "cuda": 0.001}
"""A square product that takes this long fills the device: a larger one is no faster."""
CAPTURED_CALLS = 64
COUNTED_STEPS = 3
COUNTING_LR, COUNTING_SCALE, COUNTING_EPOCHS = 1e-9, 1024.0, 1_000_000
"""Steps are counted in a trial that learns nothing and skips nothing, so that all its probes are alike."""

ProductShape = tuple[int, int, int]
"""m, k, n of a product [m, k] @ [k, n]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one training step must do, whatever program does it."""

    flops: int
    """Of the matrix products and convolutions in forward and backward pass."""
    bytes: int
    """Least that moves between memory and processor."""
    largest_product: ProductShape
    """Of the forward pass, with most FLOPs; a convolution as the product it amounts to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFloor:
    """The least seconds of one training step."""

    compute_seconds: float
    memory_seconds: float
    operations: int | None
    """That the device is given at each step (kernels, copies); None where they could not be counted."""
    launch_seconds: float | None
    """Time that starting them takes."""

    @property
    def seconds(self) -> float:
        """The roofline's floor."""
        return max(self.compute_seconds, self.memory_seconds)

    def epoch_seconds(self, images: int, batch_size: int) -> float:
        """The floor of an epoch over ``images``, whose ragged last batch is dropped."""
        return images // batch_size * self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """One measured rate."""

    what: str
    size: str
    value: float
    unit: str


class FloorMeter:
    """Measures the rates of one device, each once.

    Args:
        device: CUDA device, or CPU with the threads that torch is set to.
        seconds: spent on each measurement.
    """

    def __init__(self, device: torch.device, seconds: float = SECONDS) -> None:
        self.device = device
        self._seconds = seconds
        self.rates: list[Rate] = []
        """All rates measured so far."""

    @functools.cache  # noqa: B019 - lives as long as the benchmark
    def product_rate(self, precision: str, shape: ProductShape) -> float:
        """FLOP/s of a product of random matrices of ``shape``."""
        m, k, n = shape
        rate = 2.0 * m * k * n / self._time_product(precision, shape)
        self.rates.append(Rate(what=f"product {precision}", size=f"{m} x {k} x {n}", value=rate, unit="FLOP/s"))
        return rate

    @functools.cache  # noqa: B019
    def square_rate(self, precision: str) -> float:
        """FLOP/s of the first square product that is large enough to fill the device, and of all smaller ones."""
        best, side = 0.0, FIRST_SIDE
        while True:
            rate = self.product_rate(precision, (side, side, side))
            best = max(best, rate)
            if side >= LAST_SIDE or 2.0 * side**3 / rate > LONG_CALL_SECONDS[self.device.type]:
                return best
            side *= 2

    @functools.cache  # noqa: B019
    def bandwidth(self, count: int = COPIED_BYTES) -> float:
        """Bytes a second, read and written, of copies that move ``count`` bytes."""
        source = torch.zeros(max(1, count // 8), dtype=torch.float32, device=self.device)  # read once, written once
        target = torch.empty_like(source)
        moved = 2 * source.nbytes
        rate = moved / time_calls(lambda: target.copy_(source), self.device, self._seconds)
        self.rates.append(Rate(what="copy", size=f"{moved:,} bytes", value=rate, unit="B/s"))
        return rate

    @functools.cached_property
    def operation_seconds(self) -> float:
        """Of one small operation: in a graph's replay on CUDA, called from Python on the CPU."""
        number = torch.zeros(1, device=self.device)
        seconds = time_calls(lambda: number.add_(1), self.device, self._seconds)
        self.rates.append(Rate(what="small operation", size="1 element", value=seconds, unit="s"))
        return seconds

    def _time_product(self, precision: str, shape: ProductShape) -> float:
        m, k, n = shape
        dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
        generator = torch.Generator(self.device).manual_seed(0)
        left, right = (  # random: zeros multiply faster on a GPU, whose clock follows its power
            torch.randn(size, generator=generator, device=self.device).to(dtype) for size in ((m, k), (k, n))
        )
        out = torch.empty(m, n, dtype=dtype, device=self.device)
        # As a linear layer lays its weights out as well: in fp16 a CPU without fp16 units is ten times as fast on it.
        layouts = (right, right.t().contiguous().t())
        with fp32_arithmetic(precision):
            return min(
                time_calls(functools.partial(torch.mm, left, laid, out=out), self.device, self._seconds / len(layouts))
                for laid in layouts
            )


def time_calls(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one call, the best of ``BLOCKS`` blocks; on CUDA as part of a graph's replay, free of launches.

    A call that alone takes longer than ``seconds`` is made twice, and the second counts.
    """
    if device.type == "cuda":
        return _time_replays(call, device, seconds)
    call()
    single = _time(call)
    if single > seconds:
        return single
    count = max(1, int(seconds / BLOCKS / max(single, 1e-7)))

    def block() -> None:
        for _ in range(count):
            call()

    return min(_time(block) for _ in range(BLOCKS)) / count


def measure_step_floor(
    config: TrialConfig, input_shape: InputShape, num_classes: int, meter: FloorMeter, operations: int | None = None
) -> StepFloor:
    """The floor of one step of ``config``.

    Args:
        config: model, batch size, precision and optimizer are read from it.
        input_shape: channels, height and width of an image.
        num_classes: of the data set.
        meter: of the device.
        operations: those of a step, from ``count_operations``.
    """
    work = count_work(config, input_shape, num_classes)
    rate = max(meter.square_rate(config.precision), meter.product_rate(config.precision, work.largest_product))
    bandwidth = max(meter.bandwidth(), meter.bandwidth(work.bytes))
    return StepFloor(
        compute_seconds=work.flops / rate,
        memory_seconds=work.bytes / bandwidth,
        operations=operations,
        launch_seconds=None if operations is None else operations * meter.operation_seconds,
    )


def count_work(config: TrialConfig, input_shape: InputShape, num_classes: int) -> StepWork:
    """FLOPs and least bytes of one step, counted on tensors without content: nothing is computed."""
    with keep_generators(torch.device("cpu")):
        model = build_model(config.model, input_shape, num_classes).to("meta")
    images = torch.empty(config.batch_size, *input_shape, device="meta")
    labels = torch.empty(config.batch_size, dtype=torch.int64, device="meta")
    products = _ProductRecorder()
    with FlopCounterMode(display=False) as counter:
        with products:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
    pixels = config.batch_size * math.prod(input_shape)  # resident as uint8
    return StepWork(
        flops=counter.get_total_flops(),
        bytes=_count_update_bytes(config, model) + pixels + labels.nbytes,
        largest_product=max(products.shapes, key=math.prod, default=(1, 1, 1)),
    )


def count_operations(config: TrialConfig, data: TrainingData) -> int | None:
    """Operations of one step: kernels and copies on CUDA, in the step that is captured; on the CPU calls but views.

    Taken from two epochs of different length, so that what happens once an epoch falls out. None where CUDA's profiler
    sees nothing.
    """
    scale = COUNTING_SCALE if config.precision == "fp16" else None
    config = dataclasses.replace(config, lr=COUNTING_LR, init_scale=scale, max_epochs=COUNTING_EPOCHS)
    count = _count_kernels if data.device.type == "cuda" else _count_calls
    if data.device.type == "cuda":
        count(_build_short_run(config, data, COUNTED_STEPS))  # what libraries do once a process, and the profiler too
    few, more = (count(_build_short_run(config, data, steps)) for steps in (COUNTED_STEPS, 2 * COUNTED_STEPS))
    return round((more - few) / COUNTED_STEPS) or None


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On the CPU torch computes in one thread, as a trial's slot does."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _ProductRecorder(TorchDispatchMode):
    """Shapes of the matrix products that run while it is in force."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[ProductShape] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.shapes.append((left.shape[0], left.shape[1], right.shape[1]))
        elif name == "convolution":
            weight = args[1]  # [out channels, in channels, height, width]
            positions = result.shape[0] * math.prod(result.shape[2:])
            self.shapes.append((positions, math.prod(weight.shape[1:]), weight.shape[0]))
        return result


class _CallCounter(TorchDispatchMode):
    """Counts operations that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += int(not getattr(func, "is_view", False))
        return func(*args, **(kwargs or {}))


def _count_update_bytes(config: TrialConfig, model: nn.Module) -> int:
    """Weights, gradients and optimizer state, in fp32 whatever the precision; each is read once and written once."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    states = 1 if config.optimizer == "sgd" else 2  # momentum; first and second moment
    return 2 * (2 + states) * weights


def _build_short_run(config: TrialConfig, data: TrainingData, steps: int) -> TrainingRun:
    generator = np.random.default_rng(0)
    count = steps * config.batch_size
    shape = (count, *data.input_shape)
    split = Split(
        images=generator.integers(0, 256, shape, np.uint8),
        labels=np.resize(np.arange(data.num_classes, dtype=np.int64), count),
    )
    capture = take_again if data.device.type == "cuda" else capture_cuda_graph
    return TrainingRun(config, TrainingData(split, None, data.num_classes, data.device), capture=capture)


def take_again(step: Step) -> Step:
    """In the place of a capture: the step that would be captured is taken again and again."""
    return step


def _count_calls(run: TrainingRun) -> int:
    counter = _CallCounter()
    with counter:
        run.train_epoch()
    return counter.count


def _count_kernels(run: TrainingRun) -> int:
    """From the profiler's trace: its own summary counts annotations among the kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run.train_epoch()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return count_device_events(trace)


def count_device_events(trace: Path) -> int:
    """Kernels, copies and fills on the device in a trace of ``torch.profiler``."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)


def _time_replays(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    graph = _capture(call, device)
    replay_until(graph.replay, device, seconds)  # an idle GPU clocks down
    single = _time_on(graph.replay, device)
    count = max(1, int(seconds / BLOCKS / max(single, 1e-7)))

    def block() -> None:
        for _ in range(count):
            graph.replay()

    return min(_time_on(block, device) for _ in range(BLOCKS)) / count / CAPTURED_CALLS


def _capture(call: Callable[[], object], device: torch.device) -> Any:
    """A CUDA graph of ``CAPTURED_CALLS`` calls, warmed up on a side stream as capture asks for."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(CAPTURED_CALLS):
            call()
    return graph


def replay_until(call: Callable[[], object], device: torch.device, seconds: float) -> None:
    """Make calls for so many seconds."""
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        call()
        torch.cuda.synchronize(device)


def _time_on(call: Callable[[], object], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _time(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
