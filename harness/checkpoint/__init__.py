"""Checkpoints: what a fit needs to resume exactly."""
