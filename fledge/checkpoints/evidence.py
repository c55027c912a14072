"""The author's own module: the best evidence for what a checkpoint computes, because it decides every fact at once."""

import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fledge.checkpoints.canonical import CanonicalGPT, reference_logits
from fledge.checkpoints.facts import Fact, Status
from fledge.checkpoints.loading import Checkpoint
from fledge.checkpoints.proof import FLOAT64_TOLERANCE, probe_ids
from fledge.checkpoints.questions import Questions, Values
from fledge.cli import UserError

SOURCE = "--reference"


def settle_by_reference(
    gpt: CanonicalGPT, facts: list[Fact], own: Callable[[Tensor], Tensor]
) -> tuple[CanonicalGPT, float]:
    """Finds the facts under which the canonical GPT computes what the author's module does.

    Returns:
        The model and its largest |Δ logit|.

    Raises:
        UserError: there are none such; either the module computes something no reading has, or a stated fact is wrong.
    """
    questions = Questions(gpt, facts)
    probes = [(ids, own(ids)) for ids in probe_ids(gpt)]

    def largest(values: Values) -> float:
        return reference_error(questions.reading(values), probes).max().item()

    def mean(values: Values) -> float:
        return reference_error(questions.reading(values), probes[1:]).mean().item()

    reached = {}
    for values in _descents(questions, mean):
        reached[frozenset(values.items())] = error = largest(values)
        if error <= FLOAT64_TOLERANCE:
            break
    else:
        stated = ", ".join(f"{fact} ({fact.source})" for fact in facts if fact.stated)
        raise UserError(
            "Your own module computes something else than these tensors mean to Fledge: logits differ by "
            f"{min(reached.values()):.1e} under the closest reading."
            + (
                f" Is what you stated right: {stated}?"
                if stated
                else " No reading that Fledge knows does what it does."
            )
        )
    gpt = questions.adopt(values, SOURCE)
    for fact in facts:
        if fact.status is not Status.SHOWN and not fact.stated:
            fact.status, fact.source, fact.detail = Status.SETTLED, SOURCE, f"logits within {error:.0e}"
    return gpt, error


def _descents(questions: Questions, error: Callable[[Values], float]) -> Iterator[Values]:
    """Where steps that lower the error most lead: from the present reading, then from each first step there is.

    A step changes one fact, or two where no single one helps: two wrong facts may hide each other.
    """
    yield questions.now
    starts = [questions.now, *({**questions.now, **changes} for changes in questions.singles(questions.now))]
    for start in starts:
        values, now = start, error(start)
        while now > FLOAT64_TOLERANCE:
            for moves in (questions.singles, questions.pairs):
                tried = [(error(other), other) for other in ({**values, **changes} for changes in moves(values))]
                best = min(tried, key=lambda item: item[0], default=(math.inf, values))
                if best[0] < now:
                    break
            else:
                break
            now, values = best
        yield values


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
