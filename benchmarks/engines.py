"""What continues prompts beside Fledge, for generate.py: llama.cpp, onnxruntime, CTranslate2; and torch's int8.

Each one is called with prompts of token ids, all of one length, and a number of tokens. It returns that many greedy
tokens for each prompt; an end-of-text token ends nothing. Each uses as many threads as torch.
"""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fledge.exporting.gguf_file import Description, write_gguf
from fledge.exporting.onnx_graph import quantize_onnx, write_onnx
from fledge.generation.draws import likeliest

Engine = Callable[[list[list[int]], int], list[list[int]]]
Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def likeliest_of(logits: np.ndarray) -> list[int]:
    """The likeliest token of each row of logits (rows, V)."""
    return likeliest(torch.from_numpy(logits)).tolist()


class LlamaCpp:
    """All prompts as sequences of one batch, each with a cache of its own."""

    def __init__(self, model: Model, folder: Path, kind: str, rows: int, length: int):
        import llama_cpp

        self.cpp = llama_cpp
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        write_gguf(*model, folder / f"{kind}.gguf", Description("model", None, []), kind)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(folder / f"{kind}.gguf").encode(), settings)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_seq_max, context.n_batch = rows * length, rows, rows * length
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        context.kv_unified = False  # what llama.cpp recommends where sequences do not share a long beginning
        if kind == "f32":
            context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32  # half precision otherwise
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.batch = llama_cpp.llama_batch_init(rows * length, 0, 1)
        self.V = model[0].config.vocab_size

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        self.cpp.llama_memory_clear(self.cpp.llama_get_memory(self.context), True)
        made: list[list[int]] = [[] for _ in prompts]
        new, at = prompts, 0
        while True:
            for ids, token in zip(made, likeliest_of(self.read(new, at)), strict=True):
                ids.append(token)
            if len(made[0]) == tokens:
                return made
            at += len(new[0])
            new = [ids[-1:] for ids in made]

    def read(self, texts: list[list[int]], at: int) -> np.ndarray:
        """The logits (texts, V) after the last token of each text, whose first token has the position `at`."""
        length = len(texts[0])
        count = self.batch.n_tokens = len(texts) * length
        view = {name: np.ctypeslib.as_array(getattr(self.batch, name), (count,)) for name in ("token", "pos", "logits")}
        view["token"][:] = np.concatenate(texts)
        view["pos"][:] = np.tile(np.arange(at, at + length), len(texts))
        view["logits"][:] = np.arange(count) % length == length - 1
        for i in range(count):
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, i // length
        if self.cpp.llama_decode(self.context, self.batch):
            raise RuntimeError("llama.cpp could not read its batch")
        return np.ctypeslib.as_array(self.cpp.llama_get_logits(self.context), (len(texts), self.V))


class OnnxRuntime:
    """All prompts in one batch. Keys and values stay in onnxruntime's own tensors."""

    def __init__(self, model: Model, folder: Path, kind: str, rows: int, length: int):
        from onnxruntime import InferenceSession, OrtValue, SessionOptions

        file = folder / "onnx" / "model.onnx"
        if not file.exists():
            write_onnx(*model, folder, [])
        if kind != "f32":
            file = quantize_onnx(folder, kind)
        options = SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.value = OrtValue.ortvalue_from_numpy
        self.pasts = self.session.get_inputs()[3:]

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        rows, length = len(prompts), len(prompts[0])
        empty = [np.zeros((rows, part.shape[1], 0, part.shape[3]), np.float32) for part in self.pasts]
        past, new, made, at = [self.value(part) for part in empty], np.array(prompts), [], 0
        while True:
            length, binding = new.shape[1], self.session.io_binding()
            binding.bind_cpu_input("input_ids", new)
            binding.bind_cpu_input("attention_mask", np.ones((rows, at + length), np.int64))
            binding.bind_cpu_input("position_ids", np.tile(np.arange(at, at + length), (rows, 1)))
            for part, value in zip(self.pasts, past, strict=True):
                binding.bind_ortvalue_input(part.name, value)
            for output in self.session.get_outputs():
                binding.bind_output(output.name)
            self.session.run_with_iobinding(binding)
            logits, *past = binding.get_outputs()
            made.append(likeliest_of(logits.numpy()[:, -1]))
            if len(made) == tokens:
                return np.array(made).T.tolist()
            new, at = np.array(made[-1])[:, None], at + length


class CTranslate2:
    """All prompts in one batch, by its own loop, which reads them at once."""

    def __init__(self, model: Model, folder: Path, kind: str, rows: int, length: int):
        from ctranslate2 import Generator
        from ctranslate2.converters import TransformersConverter

        source, target, named = folder / "transformers", folder / f"ctranslate2 {kind}", kind.replace("f32", "float32")
        tokenizer = copy.deepcopy(model[1])
        for role in ("bos_token", "unk_token"):  # CTranslate2 opens no model without them
            setattr(tokenizer, role, getattr(tokenizer, role) or tokenizer.eos_token)
        model[0].save_pretrained(source)
        tokenizer.save_pretrained(source)
        TransformersConverter(str(source)).convert(str(target), quantization=named)
        self.generator = Generator(str(target), compute_type=named, intra_threads=torch.get_num_threads())
        self.tokenizer = model[1]

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        texts = [self.tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts]
        results = self.generator.generate_batch(
            texts, max_length=tokens, min_length=tokens, include_prompt_in_result=False
        )
        return [result.sequences_ids[0] for result in results]


def dynamic(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """torch's product of int8 weights (out, in) and activations that are rounded to bytes as well."""
    scales, zeros = weight.abs().amax(1) / 127, torch.zeros(len(weight), dtype=torch.int64)
    bytes_ = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(bytes_, bias)
    return lambda inputs: torch.ops.quantized.linear_dynamic(inputs, packed)


def weights_only(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """torch's product of int8 weights (out, in) and activations in bfloat16."""
    scales = weight.abs().amax(1) / 127
    bytes_, scales = (weight / scales[:, None]).round().to(torch.int8), scales.bfloat16()

    def multiply(inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1]).bfloat16()
        output = torch._weight_int8pack_mm(rows, bytes_, scales).float().view(*inputs.shape[:-1], -1)
        return output if bias is None else output + bias

    return multiply


def in_int8(model: PreTrainedModel, product: Callable[[Tensor, Tensor | None], Callable]) -> PreTrainedModel:
    """A copy of the model whose linear layers multiply by `product`."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, nn.Linear | Conv1D):
            weight = part.weight.detach().T.contiguous() if isinstance(part, Conv1D) else part.weight.detach()
            vars(part)["forward"] = product(weight, part.bias if part.bias is None else part.bias.detach())
    return model


# The package, the engine, and how it stores the weights.
ENGINES = [("llama_cpp", LlamaCpp, kind) for kind in ("f32", "f16", "q8_0", "q4_0")]
ENGINES += [("onnxruntime", OnnxRuntime, kind) for kind in ("f32", "int8")]
ENGINES += [("ctranslate2", CTranslate2, kind) for kind in ("f32", "int8")]
