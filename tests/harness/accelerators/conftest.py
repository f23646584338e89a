"""Ranks for tests: real processes, started once for many cases."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    # Worker processes and tests share modules of this folder.
    sys.path.insert(0, str(ROOT))
