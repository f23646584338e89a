"""Ready-made callbacks, one concern a file."""

from __future__ import annotations

from harness.callbacks.averaging.ema import EMA
from harness.callbacks.averaging.swa import StochasticWeightAveraging
from harness.callbacks.csv_logger import CSVLogger
from harness.callbacks.early_stopping import EarlyStopping
from harness.callbacks.gradient_clip import GradientClip
from harness.callbacks.interrupt import Interrupt
from harness.callbacks.keep_best_model import KeepBestModel
from harness.callbacks.lr_scheduler import LRScheduler
from harness.callbacks.metrics import Metrics
from harness.callbacks.model_checkpoint import ModelCheckpoint
from harness.callbacks.profile import Profile
from harness.callbacks.progress import Progress
from harness.callbacks.resuming import AutoResume, ResumeFromCheckpoint
from harness.callbacks.step_metrics import StepMetrics
from harness.callbacks.train_valid import TrainValid

__all__ = [
    "EMA",
    "AutoResume",
    "CSVLogger",
    "EarlyStopping",
    "GradientClip",
    "Interrupt",
    "KeepBestModel",
    "LRScheduler",
    "Metrics",
    "ModelCheckpoint",
    "Profile",
    "Progress",
    "ResumeFromCheckpoint",
    "StepMetrics",
    "StochasticWeightAveraging",
    "TrainValid",
]
