"""Data: from the user's data to batches."""
