"""What ranks import, also in their first fit: they are forked from a process that has it."""
# ruff: noqa: F401

from __future__ import annotations

import sklearn.metrics
import torch._dynamo  # by torch's optimizers when they are made
import torchmetrics.classification
import torchmetrics.wrappers

import harness.accelerators.deepspeed.accelerator
import tests.harness.accelerators.worker
from harness.accelerators.deepspeed.library import import_deepspeed

import_deepspeed()
