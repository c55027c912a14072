"""Fledge turns a GPT trained from scratch in plain PyTorch into an instruction-following Hugging Face model."""

import os

from fledge.api import (
    Written,
    convert,
    evaluate,
    export,
    generate,
    prepare,
    pretrain,
    publish,
    train,
    train_dpo,
    train_grpo,
    train_tokenizer,
    trim,
)
from fledge.errors import UserError
from fledge.version import __version__

__all__ = [
    "UserError",
    "Written",
    "__version__",
    "convert",
    "evaluate",
    "export",
    "generate",
    "prepare",
    "pretrain",
    "publish",
    "train",
    "train_dpo",
    "train_grpo",
    "train_tokenizer",
    "trim",
]

# How often a thread that waits for others looks again before it sleeps. OpenMP's own 300,000 take milliseconds, which
# beside another busy process are those that the late thread needs (benchmarks/busy.py). OpenMP reads it when torch is
# imported, so it is set here, before; who sets either variable decides.
SPINS = 3000
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
