"""Compare a journal with its exported files and with MLflow."""
