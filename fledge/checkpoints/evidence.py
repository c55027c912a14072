"""What settles the facts that tensors cannot show: the author's own module, or text like that it was trained on."""

import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fledge.checkpoints.canonical import ACTIVATIONS, NORMS, ROTATIONS, CanonicalGPT, reference_logits
from fledge.checkpoints.layouts import Fact, heads_fit, regroup
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.proof import FLOAT64_TOLERANCE, probe_ids
from fledge.cli import UserError
from fledge.tokenizers import encoding_of

CLEARLY = 4.0
"""Standard errors over windows by which a value of a fact must beat the assumed one on probe text to replace it."""
WINDOW, WINDOWS = 128, 16
"""Tokens and number of the probe text's windows that alternatives are compared on."""


@dataclass
class Trial:
    """What one value of one open fact would mean: the loss on probe text, or |Δ logits| against the author's module."""

    name: str
    value: object
    score: float


def alternatives(gpt: CanonicalGPT, facts: list[Fact]) -> list[tuple[dict[str, object], CanonicalGPT]]:
    """Every other value that an open fact could have: (value by fact, the model with it).

    How many heads there are, how projections are fused and what RoPE turns are changed together too: they say which
    rows belong to each other, and while one of them is wrong no value of another one looks better. Post-norm blocks
    and a missing mask are among the values, although no target holds them: the reason for refusing a model should be
    the right one.
    """
    is_open = {fact.name for fact in facts if fact.open}
    by_head = next((fact.value for fact in facts if fact.name == "qkv_by_head"), False)
    found = []

    def add(name: str, values: list, make: Callable[[object], CanonicalGPT]) -> None:
        if name in is_open or name == "causal":
            found.extend(({name: value}, make(value)) for value in values if value != getattr(gpt, name))

    def with_rows(n_head: int, grouped: bool, rope: str | None) -> CanonicalGPT:
        other = regroup(gpt, into_thirds=True) if by_head else gpt
        other = replace(other, n_head=n_head, n_kv_head=key_rows * n_head // gpt.width, rope=rope)
        if gpt.attention_scale == gpt.usual_scale:
            other = replace(other, attention_scale=other.usual_scale)
        return regroup(other) if grouped else other

    key_rows = len(gpt.tensors["blocks.0.key.weight"])
    fitting = [n for n in range(1, gpt.width // 4 + 1) if heads_fit(n, gpt.width, key_rows, bool(gpt.rope))]
    now = {"n_head": gpt.n_head, "qkv_by_head": by_head, "rope": gpt.rope}
    choices = {"n_head": fitting, "qkv_by_head": (False, True), "rope": ROTATIONS}
    for values in product(*(choices[name] if name in is_open else [now[name]] for name in now)):
        changes = {name: value for name, value in zip(now, values, strict=True) if value != now[name]}
        found += [(changes, with_rows(*values))] if changes else []
    add("attention_scale", [gpt.usual_scale, gpt.width**-0.5, 1.0], lambda value: replace(gpt, attention_scale=value))
    add("activation", list(ACTIVATIONS), lambda value: replace(gpt, activation=value))
    add("norm", list(NORMS), lambda value: replace(gpt, norm=value))
    add("embedding_scale", [1.0, gpt.width**0.5], lambda value: replace(gpt, embedding_scale=value))
    add("norm_placement", ["pre", "post"], lambda value: replace(gpt, norm_placement=value))
    add("causal", [False, True], lambda value: replace(gpt, causal=value))
    return found


def settle(
    gpt: CanonicalGPT, facts: list[Fact], score: Callable[[CanonicalGPT], Tensor], source: str
) -> tuple[CanonicalGPT, list[Trial]]:
    """Changes open facts step by step, always by what lowers the mean score most, until nothing does so clearly.

    `score` gives one number a probe (N,). Returns the model and what each remaining alternative would have scored.
    `facts` are updated in place: a fact whose alternatives are all clearly worse now rests on `source`, and of one that
    nobody stated the best value is taken even if another is as good.
    """
    assumed, adopted = {fact.name: fact.value for fact in facts if fact.source != "nobody"}, set()
    now = score(gpt)
    while True:
        tried = [(changes, other, score(other)) for changes, other in alternatives(gpt, facts)]
        better = [item for item in tried if _clearly(now, item[2])]
        # What was adopted while another fact was wrong gives way to what was assumed, if that does as well after all.
        back = [item for item in tried if item[0].items() <= assumed.items() and adopted.issuperset(item[0])]
        back = [item for item in back if not _clearly(item[2], now)]
        if not better and not back:
            break
        changes, gpt, now = min(better or back, key=lambda item: item[2].mean())
        _adopt(gpt, facts, changes, source)
        adopted |= changes.keys()
        for name in changes if not better else ():
            adopted.remove(name)
            del assumed[name]
    for fact in facts:
        others = [item for item in tried if fact.name in item[0]]
        if others and all(_clearly(scores, now) for _, _, scores in others):
            fact.source = source
        elif others and (fact.source == "nobody" or fact.name in adopted):
            changes, other, scores = min(others, key=lambda item: item[2].mean())
            if scores.mean() < now.mean():
                gpt, now = other, scores
                _adopt(gpt, facts, changes, source)
            fact.source = f"{source}, where others do as well"
    trials = [(", ".join(changes), ", ".join(map(str, changes.values())), scores) for changes, _, scores in tried]
    return gpt, [Trial(name, value, scores.mean().item()) for name, value, scores in trials]


def _clearly(more: Tensor, less: Tensor) -> bool:
    """Whether paired scores (N,) are lower in `less`, by `CLEARLY` standard errors of their mean difference."""
    difference = (more - less).double()
    if not torch.isfinite(difference).all():
        return bool(torch.isfinite(less).all())
    spread = difference.std() if len(difference) > 1 else difference.new_zeros(())
    return bool(difference.mean() > CLEARLY * spread / len(difference) ** 0.5)


def _adopt(gpt: CanonicalGPT, facts: list[Fact], changes: Mapping[str, object], source: str) -> None:
    for fact in facts:
        fact.value = changes.get(fact.name, fact.value)
        if fact.name == "attention_scale":  # the usual one follows the width of a head
            fact.value = gpt.attention_scale
    if "causal" in changes and not gpt.causal:  # the mask is a fact only when it is missing
        facts.append(Fact("causal", False, source))
    elif "causal" in changes:
        facts[:] = [fact for fact in facts if fact.name != "causal"]


def settle_by_reference(
    gpt: CanonicalGPT, facts: list[Fact], own: Callable[[Tensor], Tensor]
) -> tuple[CanonicalGPT, float]:
    """Finds the open facts under which the canonical GPT computes what the author's module does.

    Returns:
        The model and its largest |Δ logit|.

    Raises:
        UserError: there are none such; either the module computes something no target has, or a given fact is wrong.
    """
    probes = [(ids, own(ids)) for ids in probe_ids(gpt)]
    error = reference_error(gpt, probes).max().item()
    # Two wrong facts may hide each other, so that the search starts again from each first step there is.
    for changes, start in [({}, gpt), *alternatives(gpt, facts)] if error > FLOAT64_TOLERANCE else []:
        found = [replace(fact) for fact in facts]
        _adopt(start, found, changes, "--reference")
        other, _ = settle(start, found, lambda other: reference_error(other, probes[1:]), "--reference")
        error = min(error, (reached := reference_error(other, probes).max().item()))
        if reached <= FLOAT64_TOLERANCE:
            gpt, facts[:] = other, found
            break
    if error > FLOAT64_TOLERANCE:
        raise UserError(
            f"Your own module computes something else than these tensors mean to Fledge: logits differ by {error:.1e} "
            "under the closest assumptions. Parallel blocks, ALiBi or soft-capped logits would do that."
        )
    for fact in facts:
        fact.source = "--reference" if fact.open else fact.source
    return gpt, error


def settle_by_text(
    gpt: CanonicalGPT, facts: list[Fact], tokenizer: PreTrainedTokenizerBase, file: str
) -> tuple[CanonicalGPT, float, list[Trial]]:
    """Finds the open facts under which the model predicts a text best, its loss there, and what others would give.

    Raises:
        UserError: the file cannot be read, or the model is no better on it than guessing.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--probe_text {file} cannot be read as text: {error}.") from error
    with encoding_of(f"--probe_text {file}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = text_windows(ids, gpt.context_length)
    gpt, trials = settle(gpt, facts, lambda other: text_losses(other, windows), "--probe_text")
    loss = text_losses(gpt, text_windows(ids, gpt.context_length, 8 * WINDOWS, gpt.context_length)).mean().item()
    if not loss < math.log(gpt.vocab_size):
        raise UserError(
            f"The model's loss on {file} is {loss:.2f} nats per token, and guessing among {gpt.vocab_size} tokens "
            f"gives {math.log(gpt.vocab_size):.2f}: this is not its text, not its tokenizer, or not a causal pre-norm "
            "model."
        )
    return gpt, loss, trials


@torch.no_grad()
def text_losses(gpt: CanonicalGPT, windows: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of each window of token ids (N, T + 1) → (N,), in float32."""
    return torch.stack([F.cross_entropy(reference_logits(gpt, w[None, :-1], torch.float32)[0], w[1:]) for w in windows])


def text_windows(ids: list[int], context_length: int, count: int = WINDOWS, length: int = WINDOW) -> Tensor:
    """Up to `count` windows (N, T + 1) spread evenly over a text's token ids.

    Raises:
        UserError: the text is shorter than two tokens.
    """
    length = min(length, context_length, len(ids) - 1)
    if length < 1:
        raise UserError("The --probe_text holds fewer than two tokens; give some pages of the training text.")
    last = len(ids) - length - 1
    count = min(count, max(1, len(ids) // length))
    starts = [round(i * last / max(1, count - 1)) for i in range(count)]
    return torch.tensor([ids[start : start + length + 1] for start in starts])


class Config(dict):
    """A config that a constructor may read as `config["emb_dim"]` or as `config.emb_dim`."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def load_reference(spec: str, kwargs: str | None, checkpoint: Checkpoint) -> Callable[[Tensor], Tensor]:
    """The author's own module with the checkpoint's weights, in float64: token ids (B, T) → logits (B, T or 1, V).

    This is the one place where Fledge runs somebody's code, because they asked for it by name.

    Args:
        spec: `FILE.py:Class`.
        kwargs: JSON for its constructor, by keyword or as the one config it takes; by default the checkpoint's config.
        checkpoint: the loaded file.

    Raises:
        UserError: no such file or class, a constructor or forward that fails, or weights that do not fit.
    """
    file, _, name = spec.rpartition(":")
    if not file or not Path(file).is_file():
        raise UserError(f"--reference {spec} must be FILE.py:Class, and there is no file {file or spec}.")
    try:
        given = Config(json.loads(kwargs) if kwargs else checkpoint.config)
    except (ValueError, TypeError) as error:
        raise UserError(f"--reference_kwargs is no JSON object: {error}.") from error
    sys.path.insert(0, str(Path(file).resolve().parent))
    try:
        module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        source = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = source
        module_spec.loader.exec_module(source)
        author = getattr(source, name, None)
        if author is None:
            raise UserError(f"{file} defines no {name}.")
        parameters = inspect.signature(author).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        module = author(**given) if takes_any or given.keys() <= parameters.keys() else author(given)
    except UserError:
        raise
    except Exception as error:  # whatever the author's code does
        raise UserError(
            f"--reference {spec} cannot be built from {dict(given)} ({type(error).__name__}: {error}); pass its "
            "arguments as --reference_kwargs JSON."
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(module, torch.nn.Module):
        raise UserError(f"--reference {spec} is a {type(module).__name__} and no torch.nn.Module.")
    wanted = dict(module.named_parameters())
    missing = [name for name in wanted if name not in checkpoint.tensors]
    unknown = [name for name in checkpoint.tensors if name not in module.state_dict()]
    if missing or unknown:
        raise UserError(f"--reference {spec} and the checkpoint differ in {', '.join([*missing, *unknown][:3])}.")
    try:
        module.load_state_dict(checkpoint.tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"--reference {spec} has other shapes: {' '.join(str(error).split())}.") from error
    module.double().eval()

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        try:
            output = module(ids)
        except Exception as error:  # whatever the author's code does
            raise UserError(f"--reference {spec} fails in its forward: {type(error).__name__}: {error}.") from error
        output = output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise UserError(f"--reference {spec} must return logits (B, T, V), alone or before a loss.")
        return output.double()

    return logits


def reference_error(gpt: CanonicalGPT, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Largest |Δ logit| in float64 for each probe (N,) between the canonical GPT and the author's logits.

    Some authors' forward returns the last position alone; then that one is compared.
    """
    errors = []
    for ids, expected in own:
        logits = reference_logits(gpt, ids)[:, -expected.shape[1] :]
        if logits.shape != expected.shape:
            raise UserError(f"--reference gives logits {tuple(expected.shape)} where {tuple(logits.shape)} are due.")
        errors.append((logits - expected).abs().max())
    return torch.stack(errors).nan_to_num(math.inf)
