"""Artifacts of a run: files, images, tables and histograms, each complete or absent."""
