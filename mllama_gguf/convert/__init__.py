"""Files to files: a Hugging Face checkpoint to GGUF, a GGUF to a smaller one."""
