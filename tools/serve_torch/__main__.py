"""Runs as `python tools/serve_torch ...` and as `torchrun tools/serve_torch/__main__.py ...`."""

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
# A folder that is run as a program is itself on the path: its files are not top-level modules.
sys.path[:] = [str(_here.parent)] + [p for p in sys.path if Path(p or ".").resolve() != _here]

from serve_torch.signals import EarlySignals  # noqa: E402

early = EarlySignals()  # before the imports that take long

from serve_torch.cli import main  # noqa: E402

sys.exit(main(early=early))
