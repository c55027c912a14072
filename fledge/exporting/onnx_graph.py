"""Writes a model as ONNX, for transformers.js and onnxruntime."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from fledge.cli import read_json, write_json
from fledge.custom import FledgeGPTConfig
from fledge.errors import UserError
from fledge.exporting.templates import served_template
from fledge.generation.answers import is_batched
from fledge.messages import Messages
from fledge.models import attention_of


class WithCache(torch.nn.Module):
    """A model with a cache for onnxruntime: keys and values are plain tensors among its inputs and outputs."""

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
        seen = causal[None, None] & attention_mask[:, None, None].bool()
        if attention_of(self.model) == "eager":  # Gemma 2 alone: the mask is added to the scores
            seen = torch.where(seen, 0.0, torch.finfo(past[0].dtype).min)
        output = self.model(
            input_ids=input_ids,
            attention_mask=seen,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers: Any = cache.layers
        return output.logits, *(part for layer in layers for part in (layer.keys, layer.values))


def write_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, system: Messages) -> None:
    """Writes `onnx/model.onnx` with a cache, and the configs and tokenizer that transformers.js reads beside it.

    `system` is the system message that the model was trained with, or nothing.

    Inputs and outputs have the names that transformers.js expects: `past_key_values.N.key` and `present.N.key`.

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
        model.set_experts_implementation("batched_mm")  # ONNX has no operator for the default one
    past = cache_of(model, torch.zeros(2, 4, dtype=torch.long))
    caches = [f"{layer}.{part}" for layer in range(len(past) // 2) for part in ("key", "value")]
    ids = torch.zeros(2, 3, dtype=torch.long)
    batch, now, before = {0: "batch_size"}, {1: "sequence_length"}, {2: "past_sequence_length"}
    # The exporter prints and warns about its trace, which is of no use here.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            WithCache(model).eval(),
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
    tokenizer.chat_template = served_template(tokenizer, system)
    # transformers.js looks for the template in tokenizer_config.json.
    tokenizer.save_pretrained(folder, save_jinja_files=False)


@torch.no_grad()
def cache_of(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The keys and values (B, heads, T, head width) of each layer after ids (B, T)."""
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    return [part for layer in layers for part in (layer.keys, layer.values)]


def quantize_onnx(folder: Path, kind: str) -> Path:
    """Replaces the graph of `write_onnx` by one of `kind`, fp16 or int8; returns its file.

    Inputs and outputs stay in float32. The file has the name that transformers.js expects for `dtype: "int8"`.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    whole = folder / "onnx" / "model.onnx"
    file = whole.with_name(f"model_{kind}.onnx")
    if kind == "fp16":
        onnx.save(convert_float_to_float16(onnx.load(whole), keep_io_types=True), file)
    else:
        # Unsigned weights: a product of unsigned and signed bytes overflows on CPUs without VNNI.
        with _without_advice():
            quantize_dynamic(whole, file, per_channel=True, weight_type=QuantType.QUInt8)
    whole.unlink()
    config = read_json(folder / "config.json", "export.py")
    write_json(folder / "config.json", config | {"transformers.js_config": {"dtype": kind}})
    return file


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Silences onnxruntime's quantiser, which recommends a step for graphs of other exporters."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
