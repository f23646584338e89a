"""State beside parameters and buffers: what the model, the loss, callbacks and code hold."""
