"""A training step captured as a CUDA graph: one launch for the tens to hundreds of kernels of a step.

At small batches a GPU waits for Python to launch the next kernel; a replayed graph needs no Python. A replay repeats
exactly what was launched at capture, so that a step must do the same on the host every time: it finds its batch and its
place in the logs by a position on the device. A model that waits for the device, or changes on the host, trains without
a graph. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import contextlib
import io
import pickle
import random
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tune_amp.trial.collection import without_collection
from tune_amp.trial.text import describe_error

WARM_UP_STEPS = 3  # as in PyTorch's documentation: libraries and lazily created state are ready by then
# A capture is expected to take 15 to 40 ms and to save 0.2 to 0.4 ms a step. Estimates, to be measured on a GPU.
LEAST_STEPS = 100
"""Fewest steps left in a run for which a capture pays."""

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Function that returns a replay of a step, without taking the step. May raise ``CaptureError``."""


class CaptureError(Exception):
    """A step cannot be captured. Training can continue without a graph."""


class StepLoop:
    """Takes the steps of a run: the first ones eagerly, the others as replays of one captured step.

    The first steps are real training steps, and the capture takes none, so that nothing has to be undone.

    Args:
        step: one training step on a batch of indices (int64 [batch_size]). It must read its number within the epoch
            from ``position``, and add 1 to it.
        shape: largest number of steps in an epoch, and images in a step.
        device: device of the step's tensors.
        find_change: takes a step, and returns why a graph would not repeat it: ``explain_change``.
        capture: function that captures a step.
    """

    def __init__(
        self,
        step: Callable[[Tensor], None],
        shape: tuple[int, int],
        device: torch.device,
        *,
        find_change: Callable[[Step], str | None],
        capture: Capture,
    ) -> None:
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        """Number of the step within the epoch, from 0: int64 [1], on the device."""
        self._step = step
        self._batches = torch.zeros(shape, dtype=torch.int64, device=device)
        self._find_change = find_change
        self._capture = capture
        # Capture needs a stream other than the default one, and the eager steps before it need the same stream.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._warm_steps = 0
        self._replay: Step | None = None
        self._refusal: str | None = None  # why no step will be captured

    def describe(self) -> str:
        """Return ``graph``, or ``eager: `` and the reason."""
        return "graph" if self._replay is not None else f"eager: {self._refusal or 'no step captured yet'}"

    def take(self, batches: Tensor) -> None:
        """Take a step with each of ``batches``, int64 [steps, batch_size], starting at ``position`` 0."""
        self._batches[: len(batches)].copy_(batches)
        for _ in range(len(batches)):
            if self._replay is None and self._refusal is None and self._warm_up():
                continue
            (self._replay or self._take_step)()

    def _take_step(self) -> None:
        self._step(self._batches.index_select(0, self.position).flatten())

    def _warm_up(self) -> bool:
        """Take an eager step, or capture one if enough were taken; return whether a step was taken."""
        with _on_stream(self._stream):
            if self._warm_steps == WARM_UP_STEPS:
                try:
                    self._replay = self._capture(self._take_step)
                except CaptureError as error:
                    self._refusal = f"capture failed: {error}"
                return False
            self._warm_steps += 1
            if self._warm_steps == WARM_UP_STEPS:
                self._refusal = self._find_change(self._take_step)
            else:
                self._take_step()
            return True


def capture_cuda_graph(step: Step) -> Step:
    """Capture what ``step`` launches on the current stream, and return a function that replays it.

    The graph keeps its memory as long as that function exists.

    Raises:
        CaptureError: the step cannot be captured; the device is as it was before. Only torch 2.13 and 2.14 keep the
            failed capture's memory for the life of the process (https://github.com/pytorch/pytorch/pull/190348).
        torch.AcceleratorError: the device can no longer be used from this process.
    """
    generator_state = torch.cuda.get_rng_state()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # cuBLAS would keep using a workspace that other code may free. After this call it allocates one from the graph's
    # memory; after the second call only the graph uses that one (torch._inductor.cudagraph_trees does the same).
    clear_workspaces()
    try:
        with (
            without_collection(),  # it might destroy an earlier run's graph
            # thread_local: other threads of the process (Ray's) may call CUDA during the capture.
            torch.cuda.graph(graph, pool, torch.cuda.current_stream(), capture_error_mode="thread_local"),
        ):
            step()
    except Exception as error:  # a user's model may raise anything
        reason = describe_error(_find_cause(error))
        device = torch.cuda.current_device()
        release_failed_pool(
            lambda: torch._C._cuda_endAllocateToPool(device, pool),  # noqa: SLF001 - they have no public names
            lambda: torch._C._cuda_releasePool(device, pool),  # noqa: SLF001
        )
        _recover(generator_state)
        raise CaptureError(reason) from None  # the exception's frames hold tensors of the graph's memory
    finally:
        clear_workspaces()
    return graph.replay


@contextlib.contextmanager
def capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Allow ``optimizer.step`` to be captured in the ``with`` block.

    Adam refuses capture without the flag, and warns of eager steps with it; a fused one computes the same either way.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    try:
        for group in groups:
            group["capturable"] = True
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def explain_change(
    step: Step, model: nn.Module, device: torch.device, read_state: Callable[[], object] = lambda: None
) -> str | None:
    """Take ``step``, and return why a graph would not repeat it, or None if no reason was found.

    Detected are waits for the device, random numbers drawn from the host's global generators, and any change, except of
    the values of tensors, in the attributes of the model's modules and in what ``read_state`` returns. Not detected are
    changes elsewhere, and of what a function that the model holds encloses.
    """
    before = _describe_host_state(model, read_state())
    with _recording_waits(device) as warned:
        step()
    after = _describe_host_state(model, read_state())
    if any("called a synchronizing CUDA operation" in str(warning.message) for warning in warned):
        return "the model waits for the device"
    if before is None or after is None:
        return "the model's state on the host cannot be compared"
    return None if before == after else "the model changes on the host"


def clear_workspaces() -> None:
    """Free the workspaces that cuBLAS allocates with PyTorch's allocator and keeps for the life of the process."""
    torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - no public name for it


@contextlib.contextmanager
def _on_stream(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    """Run the work of the ``with`` block on ``stream``, after all earlier work and before all later work."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


def release_failed_pool(end: Callable[[], None], release: Callable[[], None]) -> None:
    """Release the memory pool of a failed capture, unless this torch has done so.

    torch before 2.13 leaves the allocator recording: ``empty_cache`` then skips the pools of all later graphs, and
    memory runs out too early (https://github.com/pytorch/pytorch/pull/180395). ``end`` stops the recording, and raises
    RuntimeError if torch has stopped it: then it has released the pool too, which must not happen twice.
    """
    try:
        end()
    except RuntimeError:
        return
    release()


def _recover(generator_state: Tensor) -> None:
    """Restore the device after a failed capture.

    Raises:
        torch.AcceleratorError: the device can no longer be used.
    """
    torch.cuda.synchronize()
    # The default generator still counts as captured and refuses to draw ("Offset increment outside graph capture",
    # ATen/cuda/CUDAGeneratorImpl.cpp): it gets a new state object that continues the same sequence.
    index = torch.cuda.current_device()
    fresh = torch.Generator(torch.device("cuda", index))
    fresh.set_state(generator_state)
    torch.cuda.default_generators[index].graphsafe_set_state(fresh)


def _find_cause(error: BaseException) -> BaseException:
    """Return the first exception of the chain: ending a broken capture raises another one, which says less."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@contextlib.contextmanager
def _recording_waits(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """Record torch's warnings of the host's waits for the device in the ``with`` block."""
    if device.type != "cuda":
        yield []
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield warned
        finally:
            torch.cuda.set_sync_debug_mode(mode)


class _StatePickler(pickle.Pickler):
    """Pickles a model's state on the host; of a tensor or function only its identity.

    A function without a name of its own, as ``torch.compile`` returns it, cannot be pickled otherwise.
    """

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value.data_ptr(), tuple(value.shape), value.requires_grad
        if isinstance(value, types.FunctionType):
            return id(value)
        return None


def _describe_host_state(model: nn.Module, more: object) -> bytes | None:
    """Return bytes that differ if something on the host has changed that the model may depend on.

    None if some attribute of the model cannot be pickled.
    """
    written = io.BytesIO()
    try:
        # Modules are described by their attributes: a module's own __getstate__ may omit some.
        _StatePickler(written).dump(
            [{**vars(module), "_modules": [name for name, _ in module.named_children()]} for module in model.modules()]
            + [more]
        )
    except Exception:  # pickle and a user's classes may raise anything
        return None
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002
    return written.getvalue() + pickle.dumps(generators)
