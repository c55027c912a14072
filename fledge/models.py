"""Opens models. All of Fledge opens them here: with all tensors, finite weights, and a vocabulary that fits."""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fledge.custom import FledgeGPTConfig, check_custom_code
from fledge.errors import UserError
from fledge.hub import find_model
from fledge.tokenizers import open_tokenizer

# Buffers that older models store beside their weights and recompute: causal masks, rotary tables, position ids.
BUFFERS = re.compile(r"(^|\.)(attn\.bias|masked_bias|causal_mask|inv_freq|(position|pos)_ids)$")
# The names of the context length in different architectures.
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
NAMED = 4  # tensors that a message names
ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_model(name: str | Path, dtype: str = "float32") -> ModelAndTokenizer:
    """Opens a model, a folder or on the Hub, with its tokenizer, on the best available device.

    Raises:
        UserError: see `find_model` and `open_model`; or the tokenizer does not open, or has more tokens than the model.
    """
    folder = find_model(name)
    model, tokenizer = open_model(folder, dtype=dtype, name=name), open_tokenizer(folder)
    check_vocabulary(model, tokenizer, name)
    nn.Module.to(model, torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return model, tokenizer


def open_model(
    folder: Path, dtype: str = "float32", name: str | Path | None = None, **settings: Any
) -> PreTrainedModel:
    """The causal model of a folder on the CPU, in evaluation mode; `settings` change its config.

    transformers initialises missing tensors at random and only warns. Here that is an error.

    Raises:
        UserError: the model does not open, needs code that is not Fledge's, has missing or left-over tensors or tensors
            of
            another shape, or holds NaN or infinity.
    """
    name = name or folder
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that all of them are reported by name
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # a damaged folder fails in many ways, on the Rust side too
        check_custom_code(folder, name)
        raise UserError(f"{name} holds no causal model that opens ({_cause(folder, error)}).") from error
    model: PreTrainedModel
    model, found = opened
    if isinstance(model.config, FledgeGPTConfig):
        check_custom_code(folder, name)
    sizes = [f"{tensor} ({_shape(held)}, not {_shape(wanted)})" for tensor, held, wanted in found["mismatched_keys"]]
    left_over = [tensor for tensor in found["unexpected_keys"] if not BUFFERS.search(tensor)]
    for fault, tensors in (
        ("lacks", found["missing_keys"]),
        ("has tensors of another shape than its config.json says:", sizes),
        ("has tensors that its config.json has no place for:", left_over),
    ):
        if tensors:
            raise UserError(
                f"{name} {fault} {_listed(tensors)}; weights and config.json do not belong together, or a file is "
                "damaged: take another copy, or write the model again."
            )
    for tensor, values in model.named_parameters():
        # A sum is finite only if all numbers are, and takes a tenth of the time of isfinite().
        if not values.sum().isfinite() and not values.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity in {tensor}; the training that wrote it diverged.")
    return model


def open_config(folder: Path, name: str | Path) -> PreTrainedConfig:
    """The config of a folder's model, with transformers' defaults for missing keys.

    Raises:
        UserError: it does not open.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file fails in many ways
        check_custom_code(folder, name)
        raise UserError(f"{name} holds no causal model that opens ({_cause(folder, error)}).") from error


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
    """Checks that a model has a row for each token of its tokenizer. `name` is the model's name, for the message.

    Raises:
        UserError: the tokenizer has tokens for which the model has no row.
    """
    rows, needed = embedding_of(model).num_embeddings, max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise UserError(
            f"The tokenizer of {name} has {needed:,} tokens, and the model has rows for {rows:,}; they do not belong "
            "together."
        )


def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    """The token embedding (V, D) of a causal model."""
    return cast(nn.Embedding, model.get_input_embeddings())


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The output head of a causal model, (D) to (V)."""
    return cast(nn.Linear, model.get_output_embeddings())


def attention_of(model: PreTrainedModel) -> str | None:
    """The name of a model's attention implementation; `None` if this release of transformers does not say."""
    return getattr(model.config, "_attn_implementation", None)


def fingerprint(folder: Path) -> str:
    """SHA-256 over a model's weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def context_of(config: PreTrainedConfig) -> int:
    """The context length of a model in tokens.

    Raises:
        UserError: the config does not say.
    """
    settings = config.to_dict()
    length = next((settings[key] for key in CONTEXTS if settings.get(key)), None)
    if length is None:
        raise UserError(f"The config of this {config.model_type} names no context length; add {CONTEXTS[0]} to it.")
    return length


def _cause(folder: Path, error: Exception) -> str:
    config = folder / "config.json"
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            return f"{config} holds no mapping"
    except (OSError, ValueError) as damage:
        return f"{config} is damaged: {damage}"
    return " ".join(f"{error}".partition("\n")[0].split()).rstrip(".")[:200] or type(error).__name__


def _shape(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))


def _listed(tensors: Collection[str]) -> str:
    names, more = sorted(tensors), len(tensors) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
