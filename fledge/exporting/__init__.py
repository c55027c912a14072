"""Export to GGUF and ONNX: proven against the original, and quantised with a measured loss."""
