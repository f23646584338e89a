"""The command ``harness``."""
