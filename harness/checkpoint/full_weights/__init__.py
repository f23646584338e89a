"""Whole weights after a fit: who holds them, and how a checkpoint gives them piece by piece."""
