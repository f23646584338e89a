"""Training on many ranks with DeepSpeed."""
