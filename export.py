"""A model folder → GGUF (llama.cpp, Ollama) or ONNX (transformers.js, onnxruntime), proven against the original.

`python export.py --help` tells the use; the code is in fledge/scripts/export.py.
"""

from fledge.cli import run
from fledge.scripts.export import main

if __name__ == "__main__":
    run(main)
