"""Files that may come from anybody: whatever is in them, a reader answers or refuses in one line, soon and in memory.

The inputs are the same each time. ``tests/fuzz/fuzz.py`` looks further; what it finds becomes a test here.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from fuzz_targets import SPACE, TARGETS, list_seeds, make_valid_run, read_parquet, replace_metadata
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tune_amp.results.page_limits import check_pages, list_pages
from tune_amp.results.parquet import checksum
from tune_amp.results.records import SCHEMAS, load_provenance
from tune_amp.trial.config import InputError

repeatable = settings(
    max_examples=80,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def mutate(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """``content`` with bytes flipped, cut, put in or repeated, each at a place between 0 and 1."""
    for kind, place, piece in edits:
        at = int(place * len(content))
        if kind == "flip":
            content = content[:at] + bytes(byte ^ 255 for byte in content[at : at + 1]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "splice":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        else:
            content = content[:at] + content[at // 2 :]
    return content


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "splice", "insert", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=12) | st.sampled_from([b"\xff" * 8, b"2^999", b"!!python/name:x", b"&a *a"]),
    ),
    max_size=4,
)


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_valid_file_is_read_or_refused_in_one_line(target: str, tmp_path: Path) -> None:
    seeds = list_seeds(target)

    @repeatable
    @given(seed=st.sampled_from(seeds), edits=EDITS)
    def check(seed: bytes, edits: list[tuple[str, float, bytes]]) -> None:
        TARGETS[target](seed[:1] + mutate(seed[1:], edits) if target != "space" else mutate(seed, edits), tmp_path)

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["run", "seed", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@repeatable
@given(data=st.data())
def test_metadata_of_any_form_is_read_or_refused_in_one_line(data: st.DataObject, tmp_path: Path) -> None:
    about = json.loads(pq.read_schema(pa.BufferReader(make_valid_run()["trials"])).metadata[b"tune_amp"])
    place: Any = about
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [key for key, value in place.items() if isinstance(value, dict)]
        place = place[data.draw(st.sampled_from(inner))] if inner else place
    key = data.draw(st.sampled_from(sorted(place)))
    if data.draw(st.booleans()):
        place[key] = data.draw(JSON)
    else:
        del place[key]
    if "provenance" in about and data.draw(st.booleans()):
        about["provenance_checksum"] = checksum(about["provenance"])  # a checksum is no signature
    read_parquet(bytes([9]) + json.dumps(about).encode(), tmp_path)


def test_provenance_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    """Found by the test above: an AttributeError."""
    about = json.loads(pq.read_schema(pa.BufferReader(make_valid_run()["trials"])).metadata[b"tune_amp"])
    about |= {"provenance": [], "provenance_checksum": checksum([])}
    path = tmp_path / "trials.parquet"
    path.write_bytes(replace_metadata(make_valid_run()["trials"], json.dumps(about).encode()))
    with pytest.raises(InputError, match=r"trials\.parquet: provenance: must be a mapping, got \[\]$"):
        load_provenance(path)


# ---- bombs: small files that stand for gigabytes ----


def write_bomb(path: Path, kind: str, columns: dict[str, pa.Array], *, groups: int = 1, **options: Any) -> None:
    """A file of ``kind`` with the metadata of a real one, whose columns are null but for ``columns``."""
    schema = pa.schema([field.with_nullable(True).remove_metadata() for field in SCHEMAS[kind]])
    count = max((len(column) for column in columns.values()), default=50_000)
    about = pq.read_schema(pa.BufferReader(make_valid_run()[kind])).metadata
    # Texts of a dictionary are written as such, and read as plain texts: ``store_schema`` would tell them apart.
    arrays = {field.name: columns.get(field.name, pa.nulls(count, field.type)) for field in schema}
    table = pa.table(arrays)
    with pq.ParquetWriter(path, table.schema, compression="zstd", store_schema=False, **options) as writer:
        for _ in range(groups):
            writer.write_table(table)
        writer.add_key_value_metadata({"tune_amp": about[b"tune_amp"].decode()})


def repeat(text: str, times: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.nulls(times, pa.int32()).fill_null(0), pa.array([text]))


def make_list(values: pa.Array) -> pa.Array:
    """One cell with all of them."""
    kind = pa.list_(pa.field("element", values.type, nullable=False))
    return pa.ListArray.from_arrays([0, len(values)], values, type=kind)


def write_columns(path: Path) -> None:
    pq.write_table(pa.table({f"c{number}": [0] for number in range(12_000)}), path)


PARQUET_BOMBS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "columns": ("best", write_columns, "must have a footer of at most 1,048,576 bytes"),
    "rows": ("trials", lambda path: write_bomb(path, "trials", {}, groups=50), "its rows must expand to at most"),
    "text": (
        "trials",
        lambda path: write_bomb(path, "trials", {"error": repeat("x" * 2**20, 10_000)}),
        "its texts must expand to at most",
    ),
    "texts in lists": (
        "trials",
        lambda path: write_bomb(path, "trials", {"inert": make_list(repeat("x" * 2**20, 10_000))}),
        "its texts must expand to at most",
    ),
    "list": (
        "epochs",
        lambda path: write_bomb(
            path,
            "epochs",
            {"loss_scale_steps": make_list(pa.nulls(10**7, pa.int64()).fill_null(7))},
        ),
        "must expand to at most",
    ),
    "page": (
        "trials",
        lambda path: write_bomb(path, "trials", {"error": pa.array(["x" * 2**27])}, use_dictionary=False),
        "its pages must expand to at most",
    ),
    "prefixes": (
        "trials",
        lambda path: write_bomb(
            path,
            "trials",
            {"error": pa.array(["x" * 2**16] * 100)},
            use_dictionary=False,
            column_encoding={"error": "DELTA_BYTE_ARRAY"},
        ),
        "must be encoded as tune_amp does, got encoding number 7",
    ),
    "nested metadata": (
        "trials",
        lambda path: path.write_bytes(replace_metadata(make_valid_run()["trials"], b"[" * 200_000)),
        "must be a readable, undamaged Parquet file",
    ),
}

# In a process of its own, whose memory nobody else uses; prints the refusal, and by how much its memory grew.
READING = """
import json, resource, sys, time
from pathlib import Path
from tune_amp.trial.config import InputError
from tune_amp.training.mnist_files import IMAGES_MAGIC, read_idx
from tune_amp.results.records import load_best, load_trials
from tune_amp.space.space import load_space

files, valid = json.loads(sys.argv[1]), sys.argv[2]
load_trials(valid), load_best(valid)  # what is loaded and allocated once
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
readers = {"best": load_best, "trials": load_trials, "space": load_space}
readers["ubyte"] = lambda path: read_idx(Path(path), IMAGES_MAGIC)
seen = {}
for name, (reader, path) in files.items():
    before, began = peak(), time.process_time()
    try:
        readers[reader](path)
        refusal = None
    except InputError as error:
        refusal = str(error)
    seen[name] = [refusal, (peak() - before) / 1024, time.process_time() - began]
print(json.dumps(seen))
"""


def read_apart(files: dict[str, tuple[str, Path]], tmp_path: Path) -> dict[str, tuple[str | None, float, float]]:
    valid = tmp_path / "valid"
    valid.mkdir()
    for kind, content in make_valid_run().items():
        (valid / f"{kind}.parquet").write_bytes(content)
    listed = json.dumps({name: (reader, str(path)) for name, (reader, path) in files.items()})
    done = subprocess.run(
        [sys.executable, "-c", READING, listed, str(valid)], capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen: dict[str, tuple[str | None, float, float]] = json.loads(done.stdout)
    return seen


def check_refused(seen: dict[str, tuple[str | None, float, float]], rules: dict[str, str]) -> None:
    assert {name: rule in str(seen[name][0]) for name, rule in rules.items()} == dict.fromkeys(rules, True), seen
    assert {name: mebibytes for name, (_, mebibytes, _) in seen.items() if mebibytes > 100} == {}
    assert {name: seconds for name, (_, _, seconds) in seen.items() if seconds > 10} == {}


def test_parquet_that_would_expand_to_gigabytes_is_refused_before_it_does(tmp_path: Path) -> None:
    files = {}
    for number, (name, (kind, write, _)) in enumerate(PARQUET_BOMBS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for beside, content in make_valid_run().items():
            (folder / f"{beside}.parquet").write_bytes(content)
        write(folder / f"{kind}.parquet")
        assert (folder / f"{kind}.parquet").stat().st_size < 4_000_000
        files[name] = ("best" if kind == "best" else "trials", folder)
    seen = read_apart(files, tmp_path)
    check_refused(seen, {name: rule for name, (_, _, rule) in PARQUET_BOMBS.items()})


def test_ubyte_file_that_promises_or_holds_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    import gzip
    import struct

    def header(*shape: int) -> bytes:
        return struct.pack(">4I", 0x803, *shape)

    def write(name: str, content: bytes, size: int | None = None) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        if size is not None:
            with path.open("r+b") as file:
                file.truncate(size)  # a hole: no disk is filled
        return path

    small = header(2, 3, 4) + bytes(24)
    files = {
        "a header that lies": write("lies-ubyte", header(2**20, 1000, 1000)),
        "a compressed header that lies": write("lies-ubyte.gz", gzip.compress(header(2**20, 1000, 1000))),
        "dimensions whose product overflows": write("overflow-ubyte", header(2**20, 2**32 - 1, 2**32 - 1)),
        "more images than there are": write("images-ubyte", header(2**32 - 1, 1, 1), 2**32 + 15),
        "a hole of a tebibyte": write("hole-ubyte", header(2**20, 2**10, 2**10), 2**40 + 16),
        "a tail of a tebibyte": write("tail-ubyte", small, 2**40),
        "a compressed tail": write("tail-ubyte.gz", gzip.compress(small + bytes(2**28), 1)),
    }
    seen = read_apart({name: ("ubyte", path) for name, path in files.items()}, tmp_path)
    rules = ("at most", "at most", "at most", "at most 16,777,216 images", "at most 1,073,741,824", "more", "more")
    check_refused(seen, dict(zip(files, rules, strict=True)))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_BOMBS = {
    "a billion laughs": (LAUGHS, "anchors and aliases (& and *) are not allowed"),
    "merge keys": ("a: {<<: *a}\n", "anchors and aliases"),
    "nesting": ("[" * 60_000, "must not be nested deeper than 10 levels"),
    "nested mappings": ("".join(f"{' ' * depth}a:\n" for depth in range(300)), "must not be nested deeper"),
    "nested questions": ("? " * 30_000, "must not be nested deeper"),
    "a long text": (f"parameters: {'x' * 60_000}", "parameters: must be a mapping of fields"),
    "a long number": (f"fixed: {{lr: {'9' * 60_000}}}", "not a valid YAML value"),
    "a long number in hexadecimal": (f"fixed: {{lr: 0x{'f' * 60_000}}}", "fixed.lr: must be"),
    "a long number in base 60": (f"fixed: {{lr: 1{':59' * 20_000}}}", "fixed.lr: "),
    "many keys": ("".join(f"k{number}: 0\n" for number in range(6_000)), "unknown key"),
    "size": (SPACE + "#" * 70_000, "is larger than 64 KiB"),
    "a Python object": ("!!python/object/apply:os.mkdir [ran]\n", "tags (!) are not allowed"),
}


def test_yaml_that_would_take_long_or_much_is_refused(tmp_path: Path) -> None:
    files = {}
    for number, (name, (text, _)) in enumerate(YAML_BOMBS.items()):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        files[name] = ("space", path)
    seen = read_apart(files, tmp_path)
    check_refused(seen, {name: rule for name, (_, rule) in YAML_BOMBS.items()})
    assert not (tmp_path / "ran").exists()


def test_space_in_the_metadata_of_a_run_is_no_larger_than_in_a_file() -> None:
    from tune_amp.space.space import parse_space

    with pytest.raises(InputError, match=r"^run: is larger than 64 KiB, too large for a search space$"):
        parse_space("run", SPACE + "#" * 70_000)


def test_pages_of_a_file_of_ours_are_all_found_and_accepted(tmp_path: Path) -> None:
    """Else the checks above would pass over what they cannot read."""
    path = tmp_path / "trials.parquet"
    path.write_bytes(make_valid_run()["trials"])
    pages = list_pages(path, SCHEMAS["trials"].names)
    assert [column.path.partition(".")[0] for column in pages] == SCHEMAS["trials"].names
    metadata = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    assert [column.path for column in pages] == [chunk.path_in_schema for chunk in chunks]
    assert [column.values for column in pages] == [chunk.num_values for chunk in chunks]
    assert [column.end - column.start for column in pages] == [chunk.total_compressed_size for chunk in chunks]
    assert [column.is_text for column in pages] == [chunk.physical_type == "BYTE_ARRAY" for chunk in chunks]
    check_pages(path, pages)
