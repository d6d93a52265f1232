"""What is fuzzed: each reader of files that may come from anybody, on any bytes.

A reader answers, or refuses with an InputError of one line. ``tests/test_fuzz.py`` tries some hundred inputs each time;
``tests/fuzz/fuzz.py`` goes on for as long as somebody has.
"""

import functools
import gzip
import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import past_runs as made
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from records import PROVENANCE, make_trial
from report_runs import SLOT_TIME
from small_mnist import encode_idx

from tune_amp.results.progress import Observer, SearchProgress
from tune_amp.results.records import (
    load_best,
    load_best_rows,
    load_provenance,
    load_trials,
    load_trials_file,
    rank_trials,
    write_best,
    write_trials,
)
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.history import open_history
from tune_amp.search.recorder import TrialRecorder
from tune_amp.space.space import load_space
from tune_amp.training.mnist_files import IMAGES_MAGIC, LABELS_MAGIC, read_idx
from tune_amp.trial.config import InputError

Target = Callable[[bytes, Path], None]

SPACE = """\
parameters:
  lr: {low: 1.0e-4, high: 3.0e-2, log: true}
  batch_size: {low: 64, high: 1024, power_of_two: true}
  precision: {choices: [fp32, bf16, fp16]}
  init_scale: {low: 1, high: 2^24, power_of_two: true, when: {precision: fp16}}
  growth_interval: {low: 0.005, high: 0.5, log: true, fraction_of_trial: true, when: {precision: fp16}}
fixed:
  backoff_factor: 0.25
"""


def accept(read: Callable[[], object]) -> bool:
    """Whether ``read`` answers; False where it refuses, as it must: in one line. Whatever else it raises comes out."""
    refusal = None
    try:
        read()
    except InputError as error:
        refusal = str(error)
    if refusal is not None and (len(refusal.splitlines()) != 1 or len(refusal) > 2_000):
        raise AssertionError(f"must refuse in one line, got {refusal[:3_000]!r}")
    return refusal is None


def read_space(data: bytes, folder: Path) -> None:
    """The search space, and configurations from it."""
    path = folder / "space.yaml"
    path.write_bytes(data)

    def suggest() -> None:
        space = load_space(str(path))
        list(space.sample(2, seed=0, train_images=1_000, max_epochs=2))

    accept(suggest)


def read_parquet(data: bytes, folder: Path) -> None:
    """What commands read of a run with ``data`` for one of its files; the first byte says which, and how it is made."""
    kind = KINDS[data[0] % 3] if data else "best"
    files = make_valid_run()
    for name, content in files.items():
        (folder / f"{name}.parquet").write_bytes(content)
    content = make_parquet(files[kind], data[1:], how=data[0] // 3 % 4 if data else 0)
    (folder / f"{kind}.parquet").write_bytes(content)
    for read in READERS[kind]:
        accept(lambda read=read: read(folder))  # type: ignore[misc]


KINDS = ("trials", "epochs", "best")
READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "trials": (load_trials, load_provenance, load_trials_file),
    "epochs": (load_trials,),
    "best": (load_best, load_best_rows),
}


def make_parquet(valid: bytes, data: bytes, how: int) -> bytes:
    """A file from ``data``: all of it; bytes changed at places; the end cut and others put there; our metadata."""
    if how == 0:
        return data
    if how == 1:
        changed = bytearray(valid)
        for at in range(0, len(data) - 2, 3):
            place = int.from_bytes(data[at : at + 2], "big") * 7 % len(changed)
            changed[-1 - place] = data[at + 2]
        return bytes(changed)
    if how == 2:
        cut = int.from_bytes(data[:2], "big") % len(valid)
        return valid[:cut] + data[2:] + valid[cut + len(data) :]
    return replace_metadata(valid, data)


def replace_metadata(valid: bytes, text: bytes) -> bytes:
    """``valid`` with ``text`` for what we wrote into the metadata."""
    table = pq.read_table(pa.BufferReader(valid))
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"tune_amp": text}), sink)
    return bytes(sink.getvalue())


def read_ubyte(data: bytes, folder: Path) -> None:
    """The file as images and as labels, plain or compressed; by the first byte, ``data`` is what was compressed."""
    plain, packed = folder / "file-ubyte", folder / "file-ubyte.gz"
    plain.write_bytes(data[1:])
    packed.write_bytes(gzip.compress(data[1:], 1) if data[:1] < b"\x80" else data[1:])
    for path in (plain, packed):
        for magic in (IMAGES_MAGIC, LABELS_MAGIC):
            accept(lambda path=path, magic=magic: read_idx(path, magic))  # type: ignore[misc]


def read_past(data: bytes, folder: Path) -> None:
    """The journal of a run, and what a search that goes on makes of it; by the first byte, its checksums are mended."""
    lines = data[1:] if data[:1] < b"\x80" else b"".join(map(with_checksum, data[1:].splitlines()))
    path = RunFolder(folder).journal
    path.write_bytes(lines)

    def go_on() -> None:
        with open_history(folder) as history:
            recorder = TrialRecorder(
                folder,
                history,
                SearchProgress(
                    run="run",
                    model="simple_net",
                    dataset="digits",
                    objectives=history.provenance.objectives,
                    num_samples=history.num_samples or 1,
                    time_budget=None,
                    started=0.0,
                ),
                Observer(),
                storage_root="/",
                begin=0.0,
                explain_death=str,
                on_fault=print,
            )
            assert recorder.trials == history.records

    accept(go_on)


def with_checksum(text: bytes) -> bytes:
    """A line of a journal."""
    return b"%08x %s\n" % (zlib.crc32(text), text)


TARGETS: dict[str, Target] = {
    "space": read_space,
    "parquet": read_parquet,
    "ubyte": read_ubyte,
    "journal": read_past,
}


# ---- where mutations start from ----


@functools.cache
def make_valid_run() -> dict[str, bytes]:
    """The files of a run of two trials."""
    trials = [make_trial("00000001"), make_trial("00000002")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_trials(folder, trials, PROVENANCE, SLOT_TIME)
        write_best(folder, rank_trials(trials), PROVENANCE)
        return {kind: (folder / f"{kind}.parquet").read_bytes() for kind in KINDS}


def list_seeds(target: str) -> list[bytes]:
    """Inputs of ``target`` that are valid, or were trouble once."""
    if target == "space":
        bundled = sorted((Path(__file__).resolve().parents[1] / "search_spaces").glob("*.yaml"))
        return [SPACE.encode(), *(path.read_bytes() for path in bundled)]
    if target == "ubyte":
        images = encode_idx(np.zeros((2, 3, 4), np.uint8))
        labels = encode_idx(np.zeros(2, np.uint8))
        return [b"\0" + images, b"\0" + labels, b"\xff" + gzip.compress(images), b"\xff" + gzip.compress(labels)]
    if target == "journal":
        events = [made.beginning(), made.session(), made.trial("a", 0), made.start("a"), made.report("a", 1)]
        events += [{"event": "lost", "at": 2.5, "trial_id": "a"}, made.start("a", 2.5), made.end("a", "failed")]
        texts = [json.dumps(event).encode() for event in events]
        return [b"\0" + b"".join(map(with_checksum, texts)), b"\xff" + b"\n".join(texts)]
    files = make_valid_run().values()
    about = pq.read_schema(pa.BufferReader(make_valid_run()["best"])).metadata[b"tune_amp"]
    changes = [bytes([kind + 3]) + struct.pack(">HB", 40, 3) for kind in range(3)]
    return [*(bytes([kind]) + content for kind, content in enumerate(files)), *changes, bytes([2 + 9]) + about]
