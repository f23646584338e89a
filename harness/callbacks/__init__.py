"""Ready-made callbacks, one concern per file."""

from __future__ import annotations

from harness.callbacks.augment.cutmix import CutMix
from harness.callbacks.augment.mixing import MixupLoss
from harness.callbacks.augment.mixup import Mixup
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
from harness.callbacks.report.notify import Notify
from harness.callbacks.report.requeue import Requeue
from harness.callbacks.report.system_metrics import SystemMetrics
from harness.callbacks.report.tensorboard import TensorBoard
from harness.callbacks.resuming import AutoResume, ResumeFromCheckpoint
from harness.callbacks.schedule.freeze import Freeze
from harness.callbacks.step_metrics import StepMetrics
from harness.callbacks.train_valid import TrainValid
from harness.callbacks.watch.nan_guard import NaNGuard
from harness.callbacks.watch.overfit_batches import OverfitBatches
from harness.callbacks.watch.sanity_check import SanityCheck

__all__ = [
    "EMA",
    "AutoResume",
    "CSVLogger",
    "CutMix",
    "EarlyStopping",
    "Freeze",
    "GradientClip",
    "Interrupt",
    "KeepBestModel",
    "LRScheduler",
    "Metrics",
    "Mixup",
    "MixupLoss",
    "ModelCheckpoint",
    "NaNGuard",
    "Notify",
    "OverfitBatches",
    "Profile",
    "Progress",
    "Requeue",
    "ResumeFromCheckpoint",
    "SanityCheck",
    "StepMetrics",
    "StochasticWeightAveraging",
    "SystemMetrics",
    "TensorBoard",
    "TrainValid",
]
