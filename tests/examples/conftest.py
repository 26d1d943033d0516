"""The files of `examples/tasks` are imported by their names, as they import each other."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "tasks"))
