"""Mixes the rows of a batch."""
