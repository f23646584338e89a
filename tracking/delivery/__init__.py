"""Delivery: a separate process sends the journal to MLflow."""
