"""Fuzzes a reader for as long as you like: ``pip install -e '.[fuzz]'``, then for instance

    python tests/fuzz/fuzz.py parquet -max_total_time=3600 corpus/parquet

Targets: space, parquet, ubyte, journal. What follows the target are libFuzzer's options and folders; inputs that reach
new code are kept in the first folder, and one that breaks the reader is written as ``crash-...`` into the current
folder. Give its path as the only argument to see it break again; then add it to ``tests/test_fuzz.py``.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["tune_amp", "yaml"]):
    from fuzz_targets import TARGETS, list_seeds

SECONDS = 20
"""That an input may take, at most."""
MEBIBYTES = 3_000
"""Of memory, for the process."""


def main() -> None:
    """Fuzz the target that the command line names."""
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="fuzz_") as temporary:
        folder = Path(temporary)
        seeds = folder / "seeds"
        seeds.mkdir()
        for content in list_seeds(name):
            (seeds / hashlib.sha256(content).hexdigest()).write_bytes(content)
        folders = [option for option in options if not option.startswith("-")]
        for place in folders[:1]:
            if not Path(place).is_file():  # else it is an input, to be seen once
                Path(place).mkdir(parents=True, exist_ok=True)
        if not folders or Path(folders[0]).is_dir():
            options += [str(seeds)] if folders else [str(folder / "found"), str(seeds)]
            (folder / "found").mkdir()
        limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEBIBYTES}", "-max_len=65536"]
        target = TARGETS[name]
        atheris.Setup([sys.argv[0], *limits, *options], lambda data: target(data, folder))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
