"""Metrics of a fit: torchmetrics objects, plain functions, and the loss average."""
