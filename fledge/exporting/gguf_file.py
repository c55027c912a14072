"""Writes a model as GGUF, for llama.cpp and Ollama."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.errors import UserError
from fledge.exporting.architectures import ARCHITECTURES
from fledge.exporting.templates import served_template
from fledge.messages import Messages
from fledge.models import context_of, embedding_of
from fledge.tokenizers.fast import merges_of
from fledge.version import __version__

if TYPE_CHECKING:
    from gguf import TokenType

# Value of --quantize → llama.cpp's names for the type of the matrices and for the type of the file.
TYPES = {"f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0")}
TYPES |= {"q4_0": ("Q4_0", "MOSTLY_Q4_0")}
# The embeddings and the head lose most, so they get a finer type, as in llama.cpp's own tools.
OUTER = ("token_embd.weight", "output.weight")


@dataclass
class Description:
    """The description of a model in a GGUF file. `system` is the system message that it was trained with, if any."""

    name: str
    license: str | None
    system: Messages


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, about: Description, kind: str = "f32"
) -> list[str]:
    """Writes weights, tokenizer and chat template to one file; returns sentences about differences in llama.cpp.

    `kind` is one of `TYPES`, the type of the matrices; vectors and the table of positions stay in float32.

    Raises:
        UserError: llama.cpp does not support the architecture, one of its options, or the tokenizer.
    """
    import gguf

    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"GGUF export does {', '.join(ARCHITECTURES)}; this model is a {config.model_type}.")
    keys, tensors = ARCHITECTURES[config.model_type](config, model.state_dict())
    if config.model_type == "stablelm" or not config.tie_word_embeddings:
        tensors["output.weight"] = model.get_output_embeddings().weight
    # Tensors are written when the file is closed, so that a refusal leaves no file.
    vocabulary, differences = _vocabulary(tokenizer, embedding_of(model).num_embeddings, about.system)
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_string("fledge.version", __version__)
    writer.add_name(about.name)
    if about.license:
        writer.add_license(about.license)
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    for key, value in keys.items():
        add: Callable[[str, Any], None] = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{config.model_type}.{key}", value)
    for key, value in vocabulary.items():
        scalars: dict[type, Callable[[str, Any], None]]
        scalars = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add = scalars.get(type(value), writer.add_array)
        add(f"tokenizer.{key}", value)
    for tensor_name, tensor in tensors.items():
        numbers = tensor.detach().cpu().float().contiguous().numpy()
        stored_as = gguf.GGMLQuantizationType[_type_of(tensor_name, numbers.shape, kind)]
        writer.add_tensor(tensor_name, gguf.quants.quantize(numbers, stored_as), raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return differences


def _type_of(tensor_name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of a stored tensor. A matrix whose rows do not fill blocks of 32 numbers stays in F16."""
    if len(shape) == 1 or tensor_name == "position_embd.weight" or kind == "f32":
        return "F32"
    if shape[-1] % 32:
        return "F16"
    return "Q8_0" if kind == "q4_0" and tensor_name in OUTER else TYPES[kind][0]


def _vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, system: Messages) -> tuple[dict[str, Any], list[str]]:
    """The keys under `tokenizer.`, with as many tokens as the model has `rows`, and sentences about differences."""
    from gguf import TokenType

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [ids.get(i, f"[unused {i}]") for i in range(rows)]
    types = [TokenType.NORMAL if i in ids else TokenType.UNUSED for i in range(rows)]
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    model, split, normalizers = parts["model"], parts["pre_tokenizer"], json.dumps(parts["normalizer"])
    is_bpe = model["type"] == "BPE"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    keys: dict[str, Any] = {"ggml.tokens": tokens}
    differences: list[str] = []
    if is_bpe and parts["normalizer"] is None and split and byte_level.items() <= split.items():
        merges = [" ".join(pair) for pair in merges_of(model)]
        keys |= {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.merges": merges}
    elif is_bpe and model["byte_fallback"] and split is None:
        keys |= _sentencepiece(model, normalizers, tokens, types)
        differences = _left_out(normalizers)
    else:
        raise UserError(
            "llama.cpp cannot run this model: it has neither byte-level BPE split as GPT-2 does nor SentencePiece's "
            "BPE, and this tokenizer is another kind."
        )
    keys |= {"ggml.token_type": [int(kind) for kind in types], "ggml.add_bos_token": False}
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    keys |= {f"ggml.{role}_token_id": i for role, i in named.items() if i is not None}
    if template := served_template(tokenizer, system):
        keys["chat_template"] = template
    return keys, differences


def _sentencepiece(
    model: dict[str, Any], normalizers: str, tokens: list[str], types: "list[TokenType]"
) -> dict[str, Any]:
    """The keys of SentencePiece's BPE, which falls back to bytes. Sets the `types` of bytes and of the unknown token.

    `normalizers` are the tokenizer's, as JSON.
    """
    from gguf import TokenType

    # SentencePiece merges by the score of the result; the rank of the merge serves as the score.
    ranks = {left + right: -float(i) for i, (left, right) in reversed(list(enumerate(merges_of(model))))}
    for i, token in enumerate(tokens):
        if types[i] is TokenType.NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = TokenType.BYTE
    keys: dict[str, Any] = {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": [ranks.get(token, -1e6) for token in tokens],
        "ggml.add_space_prefix": "Prepend" in normalizers,
    }
    if model["unk_token"]:
        unknown = tokens.index(model["unk_token"])
        types[unknown] = TokenType.UNKNOWN
        keys["ggml.unknown_token_id"] = unknown
    return keys


def _left_out(normalizers: str) -> list[str]:
    """What a tokenizer's normalizers, as JSON, do to a text and llama.cpp does not."""
    found = []
    if "Precompiled" in normalizers:
        found.append("llama.cpp takes unusual characters as they are, and this tokenizer normalizes them.")
    if r"\\A +" in normalizers:
        found.append("llama.cpp keeps runs of spaces, and this tokenizer joins them.")
    return found
