"""A model on its own: its summary, and its export to torch.export, ONNX and MLflow."""
