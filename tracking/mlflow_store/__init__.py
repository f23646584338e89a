"""MLflow: its client, and how runs, metrics and tags are mapped to it."""
