"""``python -m tune_amp``: the same as ``tune-amp``."""

import sys

from tune_amp.cli.main import main

sys.exit(main())
