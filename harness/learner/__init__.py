"""``setup`` makes a ``Learner``, which fits, evaluates and predicts; ``load`` reads a saved one."""

from __future__ import annotations

from harness.learner.learner import Learner, setup
from harness.learner.loading import load
from harness.learner.start import Start

__all__ = ["Learner", "Start", "load", "setup"]
