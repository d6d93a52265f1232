"""What watching a training costs: the probe of the gradients, and the log of every step.

The probe's share is its own time over that of the training steps, both as ``TrainingRun`` reports them, with the steps
taken as in a search: on a GPU as a CUDA graph, with a probe only every so many epochs. The log's share is
measured against a bare ``GradScaler`` loop (scale, backward, step, update) on the same batches: both take turns in
short blocks, so that whatever else the machine does falls on both, and each pair of blocks gives a ratio.
"""

import dataclasses
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.markdown import render_table
from tune_amp.training.amp import AmpStep, scaler_settings
from tune_amp.training.cuda_graph import Capture, capture_cuda_graph
from tune_amp.training.data import Dataset
from tune_amp.training.models import build_model
from tune_amp.training.optimizers import build_optimizer
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialConfig

PRECISIONS = ("fp16", "bf16", "fp32")
BATCH_SIZES = (64, 256, 1024)
LONG = 1_000_000
EPOCHS = 6
"""The first one warms up and is left out."""
BLOCKS = 50
BLOCK_IMAGES = 2_048
"""2 steps at batch size 1,024, 32 at 64: a fraction of a second, so that what disturbs one block disturbs its pair."""
MOST_IMAGES = 10_000
"""Trained on, on the CPU: the probe's share is worked out for the whole split, which has more steps to an epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """A cost as a share of training time."""

    precision: str
    batch_size: int
    median: float
    low: float
    """The first quartile."""
    high: float
    """The third."""
    count: int
    """Epochs, or epochs from probe to probe, or pairs of blocks."""
    loop: str = "eager"
    """How the steps were taken: ``graph`` or ``eager``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TelemetryCost:
    """The result of the measurement."""

    probes: tuple[Share, ...]
    """The probe's time over that of the epoch's training steps."""
    logs: tuple[Share, ...]
    """The step with its log over the bare one, minus 1."""
    train_images: int
    device: str


def measure_telemetry(
    dataset: Dataset,
    *,
    epochs: int = EPOCHS,
    blocks: int = BLOCKS,
    precisions: Sequence[str] = PRECISIONS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    deadline: float = math.inf,
) -> TelemetryCost:
    """Measure both shares for ``simple_net`` by precision and batch size; on the CPU in one thread, as trials train.

    A configuration that would start after ``deadline`` (of ``time.monotonic``) is left out.
    """
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    most = len(dataset.train) if device.type == "cuda" else MOST_IMAGES
    few = dataclasses.replace(dataset.train, images=dataset.train.images[:most], labels=dataset.train.labels[:most])
    data = TrainingData(few, None, dataset.num_classes, device)
    configs = [
        TrialConfig(precision=precision, batch_size=batch_size)
        for precision, batch_size in itertools.product(precisions, batch_sizes)
    ]
    longer = len(dataset.train) / len(few)
    pairs = [
        (measure_probe(config, data, epochs, longer), measure_log(config, data, blocks))
        for config in configs
        if time.monotonic() < deadline
    ]
    return TelemetryCost(
        probes=tuple(probe for probe, _ in pairs),
        logs=tuple(log for _, log in pairs),
        train_images=len(dataset.train),
        device="CUDA" if device.type == "cuda" else "CPU, one thread",
    )


def measure_probe(
    config: TrialConfig, data: TrainingData, epochs: int, longer: float = 1.0, capture: Capture = capture_cuda_graph
) -> Share:
    """Probe time over training time, after the first epoch: by epochs, or on a GPU by the epochs from probe to probe.

    Args:
        config: of a trial with so large a budget that a capture of its steps pays.
        data: training images; no validation is needed.
        epochs: that are trained of it; on a GPU as many times the epochs from probe to probe.
        longer: how many times as many steps an epoch shall be taken to have. The probe does not grow with them.
        capture: as ``TrainingRun`` takes it.
    """
    run = TrainingRun(dataclasses.replace(config, max_epochs=LONG), data, capture=capture)
    period = max(1, math.ceil(run.probe_every / (len(data.train) // config.batch_size)))
    told = list(itertools.islice(run.epochs(), 1 + (epochs - 1) * period))[::period]
    shares = [
        (now.probe_seconds - before.probe_seconds) / (longer * (now.train_seconds - before.train_seconds))
        for before, now in itertools.pairwise(told)
    ]
    return dataclasses.replace(_summarise(config, shares), loop=told[-1].loop.partition(":")[0])


def measure_log(config: TrialConfig, data: TrainingData, blocks: int) -> Share:
    """Time of ``AmpStep`` and its log over that of the bare loop, minus 1, by pairs of blocks after the first."""
    batches = _draw_batches(config, data)
    bare, logged = _prepare_bare(config, data), _prepare_logged(config, data)
    ratios = []
    for block in range(blocks + 1):
        chosen = list(itertools.islice(batches, _count_steps(config)))
        # Which one goes first alternates: the second finds the batches in the cache.
        runs = (bare, logged) if block % 2 else (logged, bare)
        seconds = {run: _time(run, chosen, data.device) for run in runs}
        ratios.append(seconds[logged] / seconds[bare] - 1)
    return _summarise(config, ratios[1:])


def render_telemetry(cost: TelemetryCost) -> str:
    """A Markdown table and what its figures mean."""
    about = (
        f"simple_net, {cost.train_images:,} training images, {cost.device}, torch {torch.__version__}, "
        f"Python {platform.python_version()}. Medians, quartiles in brackets, n in the titles."
    )
    spans = "spans from probe to probe" if cost.device == "CUDA" else "epochs"
    probe_title = f"probe / training time (n = {cost.probes[0].count} {spans})"
    log_title = f"log against a bare eager loop (n = {cost.logs[0].count} pairs of blocks)"
    rows = [
        (probe.precision, str(probe.batch_size), probe.loop, _render(probe, ""), _render(log, "+"))
        for probe, log in zip(cost.probes, cost.logs, strict=True)
    ]
    table = render_table(("precision", "batch", "loop", probe_title, log_title), rows)
    return f"{about}\n\n{table}\n"


def _render(share: Share, sign: str) -> str:
    return f"{share.median:{sign}.2%} ({share.low:{sign}.2%} to {share.high:{sign}.2%})"


def _summarise(config: TrialConfig, values: Sequence[float]) -> Share:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Share(
        precision=config.precision,
        batch_size=config.batch_size,
        median=median,
        low=low,
        high=high,
        count=len(values),
    )


def _draw_batches(config: TrialConfig, data: TrainingData) -> Iterator[tuple[Tensor, Tensor]]:
    """Images float32 [batch, channels, height, width] and labels int64 [batch], for ever the same ones in turn."""
    scaling = data.input_scaling(config.input_scaling)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(data.train), generator=generator).to(data.device)
    batches = [
        data.train.take(indices, scaling)
        for indices in order.split(config.batch_size)[: _count_steps(config)]
        if len(indices) == config.batch_size
    ]
    return itertools.cycle(batches)


def _count_steps(config: TrialConfig) -> int:
    return max(2, BLOCK_IMAGES // config.batch_size)


Block = Callable[[Sequence[tuple[Tensor, Tensor]]], None]


def _prepare_bare(config: TrialConfig, data: TrainingData) -> Block:
    """What PyTorch's AMP examples show, with nothing recorded."""
    model, optimizer = _build(config, data)
    scaler = torch.amp.GradScaler(data.device.type, **scaler_settings(config))
    autocast = AmpStep(config, data.device, max_steps=1).autocast

    def train(batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        for images, labels in batches:
            with autocast():
                loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return train


def _prepare_logged(config: TrialConfig, data: TrainingData) -> Block:
    """Ours: every step logged, the log read whenever an epoch's steps are in it."""
    model, optimizer = _build(config, data)
    epoch_steps = len(data.train) // config.batch_size
    amp = AmpStep(config, data.device, max_steps=epoch_steps)
    logged = itertools.count(1)

    def train(batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        for images, labels in batches:
            with amp.autocast():
                loss = nn.functional.cross_entropy(model(images), labels)
            amp.step(optimizer, loss)
            if next(logged) % epoch_steps == 0:
                amp.read_epoch()

    return train


def _build(config: TrialConfig, data: TrainingData) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(config.seed)
    model = build_model(config.model, data.input_shape, data.num_classes).to(data.device)
    return model, build_optimizer(config, model)


def _time(run: Block, batches: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> float:
    started = time.perf_counter()
    run(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
