"""GGUF and ONNX: a model folder as other programs run it, proven, and quantised with a measured verdict."""
