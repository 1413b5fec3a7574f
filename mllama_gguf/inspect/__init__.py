"""Looking inside: what is in model files, which models are here, tensors by name."""
