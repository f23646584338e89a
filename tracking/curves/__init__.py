"""Curves of a run: its metrics' points by name, thinned to what a picture shows, and drawn."""
