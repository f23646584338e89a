"""Data: from what the user passes to batches."""
