"""Runs exported files in llama.cpp and onnxruntime, and compares their logits."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.models import context_of

# llama.cpp computes GELU by a table of half-precision numbers, which limits the accuracy of its logits.
GGUF_TOLERANCE = 5e-3
ONNX_TOLERANCE = 1e-4


class Program(Protocol):
    """An exported model that reads one text at a time."""

    def restart(self) -> None:
        """Clears the cache."""

    def read(self, ids: list[int]) -> np.ndarray:
        """Continues the text with `ids`; returns the logits (len(ids), V) after each. The next call overwrites them."""


class LlamaCpp:
    """A GGUF file in llama.cpp, for texts of up to `context` tokens."""

    def __init__(self, file: Path, context: int):
        from llama_cpp import GGML_TYPE_F32, Llama

        full: Any = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}  # its cache is in half precision otherwise
        self.llama = Llama(str(file), n_ctx=context, n_batch=context, logits_all=True, verbose=False, **full)

    def restart(self) -> None:
        self.llama.reset()

    def read(self, ids: list[int]) -> np.ndarray:
        before = self.llama.n_tokens
        self.llama.eval(ids)
        return self.llama.scores[before : before + len(ids)]

    def ids(self, text: str) -> list[int]:
        """The token ids of a prompt in llama.cpp, with control tokens recognised."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)


class OnnxRuntime:
    """A graph of `write_onnx` in onnxruntime."""

    def __init__(self, file: Path):
        from onnxruntime import InferenceSession

        self.session = InferenceSession(file, providers=["CPUExecutionProvider"])
        self.empty = {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
            for entry in self.session.get_inputs()[3:]
        }
        self.restart()

    def restart(self) -> None:
        self.past, self.at = list(self.empty.values()), 0

    def read(self, ids: list[int]) -> np.ndarray:
        end = self.at + len(ids)
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.at, end)[None],
        }
        logits, *self.past = self.session.run(None, inputs | dict(zip(self.empty, self.past, strict=True)))
        self.at = end
        return logits[0]


def logits_of(program: Program, prompts: list[list[int]]) -> list[np.ndarray]:
    """The program's logits (length, V) on each prompt: half of it at once, the rest by token, with the cache."""
    found = []
    for prompt in prompts:
        half = max(1, len(prompt) // 2)
        program.restart()
        parts = [prompt[:half], *([token] for token in prompt[half:])]
        found.append(np.concatenate([program.read(part).copy() for part in parts]))
    return found


@torch.no_grad()
def largest_error(model: PreTrainedModel, prompts: list[list[int]], logits: list[np.ndarray]) -> float:
    """The largest |Δ| of `logits` (length, V) to the model's own on the prompts, over the largest |logit|."""
    errors = []
    for prompt, found in zip(prompts, logits, strict=True):
        expected = model(input_ids=torch.tensor([prompt])).logits[0].numpy()
        errors.append(np.abs(found - expected).max() / np.abs(expected).max())
    return float(max(errors))


def random_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts of one token, of 33, and of a whole context."""
    context, V = context_of(model.config), min(len(tokenizer), model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(V, (min(n, context),), generator=generator).tolist() for n in (1, 33, context)]
