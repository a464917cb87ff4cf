"""Training of the codec: configuration, data, losses, the step and its checkpoints. Inference never imports it."""
