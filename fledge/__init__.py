"""Fledge turns a GPT trained from scratch in plain PyTorch into an instruction-following Hugging Face model."""

__version__ = "0.1.0"
