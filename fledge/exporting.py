"""A model folder as GGUF, which llama.cpp and Ollama run, or as ONNX, which transformers.js and onnxruntime run.

Each is proven against the original: its logits on the same prompts, by the program that will run it.
"""

import contextlib
import copy
import io
import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, StableLmConfig
from transformers.cache_utils import DynamicCache

from fledge.cli import UserError
from fledge.custom import FledgeGPTConfig
from fledge.generation.answers import is_batched
from fledge.models import context_of, embedding_of
from fledge.tokenizers.fast import merges_of
from fledge.version import __version__

# The marks of Python's templates for training; no other reader of a template knows them.
GENERATION_MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# llama.cpp looks the GELU up in a table of half-precision numbers: its own logits are this near to exact ones.
GGUF_TOLERANCE = 5e-3
ONNX_TOLERANCE = 1e-4


def served_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template without the marks that only training needs. White space that they trim is taken away first."""
    template = tokenizer.chat_template
    if not template:
        return None
    template = re.sub(r"\s*(?=\{%-\s*(?:end)?generation)", "", template)
    template = re.sub(r"((?:end)?generation\s*-%\})\s*", r"\1", template)
    return GENERATION_MARKS.sub("", template)


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, name: str) -> list[str]:
    """Writes weights (float32), tokenizer and chat template to one file; returns what llama.cpp will do differently.

    Raises:
        UserError: llama.cpp has no counterpart of the architecture, one of its options, or the tokenizer.
    """
    import gguf

    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"GGUF export does {', '.join(ARCHITECTURES)}; this model is a {config.model_type}.")
    keys, tensors = ARCHITECTURES[config.model_type](config, model.state_dict())
    if config.model_type == "stablelm" or not config.tie_word_embeddings:
        tensors["output.weight"] = model.get_output_embeddings().weight
    # Tensors are written as the file is closed, so that what is refused leaves nothing.
    vocabulary, differences = _vocabulary(tokenizer, embedding_of(model).num_embeddings)
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_string("fledge.version", __version__)  # by which a later export knows a file of its own
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
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
        writer.add_tensor(tensor_name, tensor.detach().cpu().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return differences


def _gpt2(config: GPT2Config, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _refuse(
        {
            f"activation {config.activation_function}": "gelu" not in config.activation_function,
            "attention without its scale": not config.scale_attn_weights,
            "attention scaled by layer": config.scale_attn_by_inverse_layer_idx,
        }
    )
    tensors = {
        "token_embd.weight": weights["transformer.wte.weight"],
        "position_embd.weight": weights["transformer.wpe.weight"],
    }
    names = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2"}
    names |= {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    pairs = [(f"blk.{n}.{to}", f"transformer.h.{n}.{of}") for n in range(config.n_layer) for to, of in names.items()]
    for target, source in [*pairs, ("output_norm", "transformer.ln_f")]:
        weight = weights[f"{source}.weight"]
        # transformers' GPT-2 keeps its projections (in, out), GGUF (out, in).
        tensors[f"{target}.weight"] = weight.T if ".c_" in source else weight
        tensors[f"{target}.bias"] = weights[f"{source}.bias"]
    inner = config.n_inner or 4 * config.n_embd
    return {"feed_forward_length": inner, "attention.layer_norm_epsilon": float(config.layer_norm_epsilon)}, tensors


def _llama(config: LlamaConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _refuse({f"activation {config.hidden_act}": config.hidden_act != "silu"})
    keys, tensors = _rotary(config, weights)
    # llama.cpp turns neighbours of a head, transformers its halves.
    for name in [name for name in tensors if ".attn_q." in name or ".attn_k." in name]:
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        weight = tensors[name]
        tensors[name] = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
    # Heads may have another width than their share of the model's.
    keys |= dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), config.head_dim)
    return keys | {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps)}, tensors


def _stablelm(config: StableLmConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _refuse(
        {
            f"activation {config.hidden_act}": config.hidden_act != "silu",
            "norms of queries and keys": config.qk_layernorm,
            "parallel sublayers": config.use_parallel_residual,
        }
    )
    keys, tensors = _rotary(config, weights)
    return keys | {"attention.layer_norm_epsilon": float(config.layer_norm_eps)}, tensors


def _rotary(
    config: LlamaConfig | StableLmConfig, weights: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What LLaMA and StableLM have in common."""
    rope: Any = config.rope_parameters
    _refuse({f"RoPE of the kind {rope['rope_type']}": rope["rope_type"] != "default"})
    head = config.hidden_size // config.num_attention_heads
    keys = {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
    }
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    names |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    pairs = [
        (f"blk.{n}.{to}", f"model.layers.{n}.{of}") for n in range(config.num_hidden_layers) for to, of in names.items()
    ]
    tensors = {
        f"{target}.{kind}": weights[f"{source}.{kind}"]
        for target, source in [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), *pairs]
        for kind in ("weight", "bias")
        if f"{source}.{kind}" in weights
    }
    return keys, tensors


Written = tuple[dict[str, Any], dict[str, Tensor]]  # keys below the architecture's name, tensors by GGUF's names
ARCHITECTURES: dict[str, Callable[[Any, dict[str, Tensor]], Written]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "stablelm": _stablelm,
}


def _refuse(obstacles: dict[str, bool]) -> None:
    if found := next((obstacle for obstacle, there in obstacles.items() if there), None):
        raise UserError(f"llama.cpp cannot run this model: it has no {found}.")


def _vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[dict[str, Any], list[str]]:
    """The keys below `tokenizer.` for a vocabulary of as many tokens as the model has `rows`, and differences."""
    from gguf import TokenType

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [ids.get(i, f"[unused {i}]") for i in range(rows)]
    types = [TokenType.NORMAL if i in ids else TokenType.UNUSED for i in range(rows)]
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    model, split = parts["model"], parts["pre_tokenizer"]
    merges = merges_of(model) if model["type"] == "BPE" else []
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    keys: dict[str, Any] = {"ggml.tokens": tokens}
    differences: list[str] = []
    if model["type"] == "BPE" and parts["normalizer"] is None and split and byte_level.items() <= split.items():
        keys |= {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.merges": [" ".join(pair) for pair in merges]}
    elif model["type"] == "BPE" and model["byte_fallback"] and split is None:
        # SentencePiece joins what makes the piece of the highest score; the order of the merges stands for it.
        ranks = {left + right: -float(i) for i, (left, right) in reversed(list(enumerate(merges)))}
        for i, token in enumerate(tokens):
            if types[i] is TokenType.NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
                types[i] = TokenType.BYTE
        normalizers = json.dumps(parts["normalizer"])
        if "Precompiled" in normalizers:
            differences.append("llama.cpp takes unusual characters as they are, and this tokenizer normalizes them.")
        if r"\\A +" in normalizers:
            differences.append("llama.cpp keeps runs of spaces, and this tokenizer joins them.")
        keys |= {
            "ggml.model": "llama",
            "ggml.pre": "default",
            "ggml.scores": [ranks.get(token, -1e6) for token in tokens],
            "ggml.add_space_prefix": "Prepend" in normalizers,
        }
        if model["unk_token"]:
            unknown = tokens.index(model["unk_token"])
            types[unknown] = TokenType.UNKNOWN
            keys["ggml.unknown_token_id"] = unknown
    else:
        raise UserError(
            "llama.cpp cannot run this model: it has neither byte-level BPE split as GPT-2 does nor SentencePiece's "
            "BPE, and this tokenizer is another kind."
        )
    keys |= {"ggml.token_type": [int(kind) for kind in types], "ggml.add_bos_token": False}
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    keys |= {f"ggml.{role}_token_id": i for role, i in named.items() if i is not None}
    if template := served_template(tokenizer):
        keys["chat_template"] = template
    return keys, differences


def gguf_logits(file: Path, prompts: list[list[int]]) -> list[np.ndarray]:
    """llama.cpp's logits (length, V) on each prompt."""
    from llama_cpp import GGML_TYPE_F32, Llama

    longest = max(map(len, prompts))
    full: Any = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}  # its cache is in half precision otherwise
    llama = Llama(str(file), n_ctx=longest, n_batch=longest, logits_all=True, verbose=False, **full)
    found = []
    for prompt in prompts:
        llama.reset()
        llama.eval(prompt)
        found.append(np.array(llama.scores[: len(prompt)]))
    llama.close()
    return found


def gguf_ids(file: Path, texts: list[str]) -> list[list[int]]:
    """The ids that llama.cpp makes of prompts, control tokens in them recognised."""
    from llama_cpp import Llama

    llama = Llama(str(file), vocab_only=True, verbose=False)
    ids = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    llama.close()
    return ids


class _WithCache(torch.nn.Module):
    """A model as onnxruntime calls it: keys and values go in and come out as plain tensors."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        before, length = past[0].shape[2], input_ids.shape[1]
        causal = torch.arange(before + length) <= (torch.arange(length) + before)[:, None]
        output = self.model(
            input_ids=input_ids,
            attention_mask=causal[None, None] & attention_mask[:, None, None].bool(),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers: Any = cache.layers
        return output.logits, *(part for layer in layers for part in (layer.keys, layer.values))


def write_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `onnx/model.onnx` with a cache, and the configs and tokenizer that transformers.js reads beside it.

    Names are those of the models on the Hub that run there: `past_key_values.N.key` goes in, `present.N.key` comes out.

    Raises:
        UserError: transformers.js does not know the architecture, or its cache does not fit the graph.
    """
    config = model.config
    if isinstance(model.config, FledgeGPTConfig):
        raise UserError("transformers.js has no fledge_gpt, Fledge's own architecture; serve it with transformers.")
    if not is_batched(model):
        raise UserError(
            f"The ONNX graph has a cache without sliding windows and ALiBi, and this {config.model_type} has one of "
            "them; serve it with transformers."
        )
    if "num_experts_per_tok" in config.to_dict():
        model.set_experts_implementation("batched_mm")  # the usual one has no counterpart in ONNX
    past = _cache_of(model, torch.zeros(2, 4, dtype=torch.long))
    caches = [f"{layer}.{part}" for layer in range(len(past) // 2) for part in ("key", "value")]
    ids = torch.zeros(2, 3, dtype=torch.long)
    batch, now, before = {0: "batch_size"}, {1: "sequence_length"}, {2: "past_sequence_length"}
    # A length is told from a constant by its name; the exporter's notes on what it traced are of no use here.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            _WithCache(model).eval(),
            (ids, torch.ones(2, 7, dtype=torch.long), torch.ones_like(ids), past),
            dynamo=True,
            verbose=False,
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{name}" for name in caches),
            ],
            output_names=["logits", *(f"present.{name}" for name in caches)],
            dynamic_shapes=(
                batch | now,
                batch | {1: "total_sequence_length"},
                batch | now,
                [batch | before] * len(caches),
            ),
        )
    (folder / "onnx").mkdir()
    assert program  # dynamo=True returns one
    program.save(folder / "onnx" / "model.onnx", external_data=False)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = served_template(tokenizer)
    # transformers.js looks for the template in tokenizer_config.json.
    tokenizer.save_pretrained(folder, save_jinja_files=False)


@torch.no_grad()
def _cache_of(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The keys and values (B, heads, T, head width) of each layer after ids (B, T)."""
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    return [part for layer in layers for part in (layer.keys, layer.values)]


def onnx_logits(file: Path, prompts: list[list[int]]) -> list[np.ndarray]:
    """onnxruntime's logits (length, V) on each prompt: half of it at once, the rest by token, with the cache."""
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    empty = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in session.get_inputs()[3:]
    }
    found = []
    for prompt in prompts:
        half = max(1, len(prompt) // 2)
        parts = [prompt[:half], *([token] for token in prompt[half:])]
        past, at, logits = list(empty.values()), 0, []
        for part in parts:
            inputs = {
                "input_ids": np.array([part]),
                "attention_mask": np.ones((1, at + len(part)), np.int64),
                "position_ids": np.arange(at, at + len(part))[None],
            }
            of_part, *past = session.run(None, inputs | dict(zip(empty, past, strict=True)))
            logits.append(of_part[0])
            at += len(part)
        found.append(np.concatenate(logits))
    return found


@torch.no_grad()
def largest_error(model: PreTrainedModel, prompts: list[list[int]], logits: list[np.ndarray]) -> float:
    """The largest |Δ| of `logits` (length, V) to the model's own on the prompts, over the largest |logit|."""
    errors = []
    for prompt, found in zip(prompts, logits, strict=True):
        expected = model(input_ids=torch.tensor([prompt])).logits[0].numpy()
        errors.append(np.abs(found - expected).max() / np.abs(expected).max())
    return float(max(errors))
