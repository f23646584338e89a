"""Checks of a training: before it starts, while it runs, and on a few batches."""
