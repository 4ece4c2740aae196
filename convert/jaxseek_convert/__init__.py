"""Hugging Face safetensors to jaxseek checkpoints and back, by one weight table."""
