"""The proof that a converted model computes what the canonical GPT computes.

The same token ids, the probes, go through both. The logits must agree in float64 before anything is written, and in
float32 after the saved folder is opened again.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.checkpoints.targets.folds import ACROSS_ROTATION
from fledge.errors import UserError

FLOAT64_TOLERANCE = 1e-9
"""Largest |Δ logit| with both sides in float64, as a share of the largest |logit|."""
ROTATION_TOLERANCE = 1e-6
"""The same where the sides may differ by the rounding of RoPE's table, which is made in float32. Authors make it by
cosines and sines or as complex numbers, which differ in the last bit. And it preserves lengths only to 6e-8 in each
layer, which shows where a norm moved past the rotation: random models reach 1.1e-7."""
FLOAT32_TOLERANCE = 1e-5
"""Largest |Δ logit| in float32, as a share of the largest |logit|. A wrong GELU is about 5e-4 off."""
READ_AT_ONCE = 1 << 22
"""Numbers of a file that are in memory at a time."""
PROBE_WORK = 4e9
"""Parameters times positions that a probe may cost: a small model is probed at every position of its context."""

Probes = list[tuple[Tensor, Tensor]]
"""Token ids (B, T), each with the canonical GPT's logits (B, T, V) in float64."""


def probe_ids(gpt: CanonicalGPT, avoid: Collection[int] = ()) -> list[Tensor]:
    """Token ids (B, T) that touch a spread of the vocabulary; the same on every run.

    One row is as long as the context where the model is small enough; the first and the last token of the vocabulary,
    which code may treat apart, stand within it and at its ends. Four rows are at most eight tokens long. Ids to
    `avoid`, such as padding, are replaced by another.
    """
    parameters = sum(tensor.numel() for tensor in gpt.tensors.values())
    length = min(gpt.context_length, max(32, int(PROBE_WORK / parameters)))
    generator = torch.Generator().manual_seed(0)
    long = torch.randint(gpt.vocab_size, (1, length), generator=generator)
    long[0, length // 2], long[0, length // 3] = gpt.vocab_size - 1, 0
    long[0, 0], long[0, -1] = 0, gpt.vocab_size - 1
    short = torch.randint(gpt.vocab_size, (4, min(8, length)), generator=generator)
    other = next((i for i in range(gpt.vocab_size) if i not in avoid), 0)
    for ids in (long, short):
        for avoided in avoid:
            ids[ids == avoided] = other
    return [long, short]


def probes_of(gpt: CanonicalGPT) -> Probes:
    """The probes of a model, with its logits."""
    return [(ids, canonical_logits(gpt, ids)) for ids in probe_ids(gpt)]


def prove_exact(
    probes: Probes, model: PreTrainedModel, weights: Mapping[str, Tensor], folds: Sequence[str] = ()
) -> float:
    """Proves that `model`, on the meta device, computes the logits of the probes with `weights` in float64.

    Returns:
        The largest |Δ logit| as a share of the largest |logit|: gains of a million make logits, and their rounding, a
        million times as large.

    Raises:
        UserError: it is above `FLOAT64_TOLERANCE`, or after a fold past a rotation `ROTATION_TOLERANCE`.
    """
    tolerance = ROTATION_TOLERANCE if ACROSS_ROTATION in folds else FLOAT64_TOLERANCE
    with _streamed(model, weights), _InFloat64():
        relative, _ = _logit_error(probes, model)
    if not relative <= tolerance:
        raise UserError(
            f"The conversion is wrong: logits differ by {relative:.1e} of the largest in float64, "
            f"{tolerance:g} allowed."
        )
    return relative


def prove_written(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Proves that a safetensors file holds exactly `weights`, rows that no probe touches among them.

    It is read a few rows at a time, and opened anew for each tensor, so that no tensor is in memory a second time.

    Raises:
        UserError: a tensor is missing, differs, or is one too many.
    """
    with safe_open(file, framework="pt") as written:
        names = set(written.keys())
    for name in sorted(names | weights.keys()):
        if name not in names or name not in weights or not _is_written(file, name, weights[name]):
            raise UserError(f"{file} reads back another {name} than was written; is the disk sound?")


def _is_written(file: Path, name: str, tensor: Tensor) -> bool:
    """Whether the tensor `name` in a file is `tensor`, both of one dtype."""
    with safe_open(file, framework="pt") as opened:
        written = opened.get_slice(name)
        if tuple(written.get_shape()) != tuple(tensor.shape):
            return False
        rows = max(1, READ_AT_ONCE // max(1, tensor[:1].numel()))
        starts = range(0, len(tensor), rows)
        return all(torch.equal(written[start : start + rows], tensor[start : start + rows]) for start in starts)


def rounding(gpt: CanonicalGPT, probes: Probes) -> float:
    """The error of float32 for this model: largest |Δ logit| of its own forward, as a share of the largest |logit|."""
    errors = [(canonical_logits(gpt, ids, torch.float32) - expected).abs().max().item() for ids, expected in probes]
    return _share(max(errors), probes)


def prove_saved(probes: Probes, model: PreTrainedModel, float32_rounding: float = 0.0) -> dict[str, float]:
    """Proves that the reloaded float32 `model` computes the logits of the probes.

    `float32_rounding` is the model's own (`rounding`). Where it is large, four times as much is allowed, at most ten
    times the usual tolerance, which is still far from a wrong GELU.

    Returns:
        The largest |Δ logit| as a share of the largest |logit|, and the share of positions with the same arg max.

    Raises:
        UserError: the error is above `FLOAT32_TOLERANCE`, or what this model's rounding allows.
    """
    allowed = max(FLOAT32_TOLERANCE, min(4 * float32_rounding, 10 * FLOAT32_TOLERANCE))
    relative, equal = _logit_error(probes, model)
    if not relative <= allowed:
        raise UserError(f"The saved model differs by {relative:.1e} of its largest logit, {allowed:.1g} allowed.")
    return {"max_relative_error": relative, "argmax_equal": equal}


@torch.no_grad()
def prove_greedy(gpt: CanonicalGPT, model: PreTrainedModel, new_tokens: int = 16) -> int:
    """Proves that `model` continues a prompt greedily, with its cache, as the canonical GPT does.

    A choice is right if no other token has a canonical logit larger by more than float32 allows (`FLOAT32_TOLERANCE`),
    because random weights may give equal logits.

    Returns:
        How many tokens were checked.

    Raises:
        UserError: the model chose another token than its source would have.
    """
    prompt = probe_ids(gpt)[1][:1, : max(1, min(8, gpt.context_length - new_tokens))]
    count = min(new_tokens, gpt.context_length - prompt.shape[1])
    if count < 1:
        return 0
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count}
    ids = cast(Any, model).generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    logits = canonical_logits(gpt, ids[:, :-1])[0, prompt.shape[1] - 1 :]
    chosen = logits.gather(1, ids[0, prompt.shape[1] :, None])[:, 0]
    short = (logits.amax(-1) - chosen) / logits.abs().amax()
    if not short.max() <= 2 * FLOAT32_TOLERANCE:
        raise UserError(
            f"The saved model continues differently from its source: at token {int(short.argmax()) + 1} its choice is "
            f"{short.max().item():.1e} of the largest logit below the best."
        )
    return count


@contextlib.contextmanager
def _streamed(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Runs a model on the meta device in float64, each module's weights widened only while it computes.

    A 160M-parameter model in float64 would be 1.3 GB beside its source. Embeddings are widened after the lookup.
    """
    handles = []
    scaled = [part for part in model.modules() if "embed_scale" in dict(part.named_buffers(recurse=False))]
    for module in scaled:  # Gemma's embedding keeps the root of the width in float32
        module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
    experts = model.get_experts_implementation()
    model.set_experts_implementation("eager")  # it computes in any dtype
    embedding = model.get_input_embeddings()
    tied = next(f"{prefix}.weight" for prefix, module in model.named_modules() if module is embedding)
    for prefix, module in model.named_modules():
        if own := [name for name, _ in module.named_parameters(recurse=False)]:
            parameters = {name: weights[key if (key := f"{prefix}.{name}") in weights else tied] for name in own}
            handles.append(module.register_forward_pre_hook(partial(_widen, parameters)))
            handles.append(module.register_forward_hook(partial(_release, own)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in scaled:
            module.embed_scale = module.embed_scale.float()
        model.set_experts_implementation(experts)
        model.tie_weights()  # or a tied head would be counted as one more matrix


def _widen(parameters: Mapping[str, Tensor], module: nn.Module, inputs: object) -> None:
    for name, tensor in parameters.items():
        widened = tensor if isinstance(module, nn.Embedding) else tensor.double()
        setattr(module, name, nn.Parameter(widened, requires_grad=False))


def _release(names: list[str], module: nn.Module, inputs: object, output: Any) -> Any:
    for name in names:
        setattr(module, name, nn.Parameter(getattr(module, name).to("meta"), requires_grad=False))
    return output.double() if isinstance(module, nn.Embedding) else output


class _InFloat64(TorchFunctionMode):
    """Ignores transformers' casts to float32 in a float64 model: in norms, softmax and routers.

    What is made in float32 from whole numbers, as tables of rotations are, stays so.
    """

    def __torch_function__(
        self, function: Callable, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args):
            if function is Tensor.float:
                return args[0]
            args = [torch.float64 if value is torch.float32 else value for value in args]
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return function(*args, **kwargs)


@torch.no_grad()
def _logit_error(probes: Probes, model: PreTrainedModel) -> tuple[float, float]:
    """Largest |Δ logit| as a share of the largest |logit|, and the share of positions with the same arg max."""
    model.eval()
    errors, equal, positions = [], 0, 0
    for ids, expected in probes:
        logits = model(input_ids=ids, use_cache=False).logits.double()
        errors.append((logits - expected).abs().max())
        equal += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        positions += ids.numel()
    return _share(torch.stack(errors).max().item(), probes), equal / positions  # a NaN stays a NaN


def _share(error: float, probes: Probes) -> float:
    """An error as a share of the largest |logit|, or the error itself if all logits are zero."""
    largest = max(logits.abs().max().item() for _, logits in probes)
    return error / largest if largest else error
