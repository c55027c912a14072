"""Finds the state dict in what a training script saved, the config beside it, and everything else."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fledge.errors import UserError

WRAPPERS = ("model_state_dict", "model_state", "state_dict", "model")

CONFIGS = ("config", "hyper_parameters", "model_args", "model_config", "args", "hparams")

PROGRESS = re.compile(r"epoch|step|iter|loss|(^|_)lr|learning|seed|version|time|best|perplexity|acc|score|date|name")

CLASS = "class of the pickled module"

BESIDE = {"optim": "optimizer state", "sched": "scheduler state", r"(^|_)(ema|swa)(_|$)": "an EMA copy"}


def unwrap(file: Path, content: object) -> tuple[Mapping, dict[str, object], dict[str, str], list[Mapping]]:
    """The state dict, the config beside it, what else is beside it and why, and every mapping on the way there."""
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, not a state dict; save model.state_dict() instead.")
    config: dict[str, object] = {}
    left_out: dict[str, str] = {}
    inner: Mapping = content
    levels = [inner]
    while True:
        config = _beside(inner) | config
        for key in configs_in(inner):
            config |= inner[key]
        wrapper = next((key for key in WRAPPERS if isinstance(inner.get(key), Mapping)), _only_state(inner))
        # Two levels of wrapping are all that people write; a damaged file may hold itself.
        if wrapper is None or len(levels) == 3:
            return inner, config, left_out, levels
        for key, value in inner.items():
            if key != wrapper and key not in configs_in(inner):
                left_out[str(key)] = _why_beside(str(key), value) or f"beside {wrapper}"
        inner = inner[wrapper]
        levels.append(inner)


def _only_state(content: Mapping) -> str | None:
    """The one key, whatever it is called, that holds a mapping of tensors, where no tensors stand beside it."""
    if any(isinstance(value, Tensor) and value.dim() for value in content.values()):
        return None
    found = [
        key
        for key, value in content.items()
        if isinstance(value, Mapping)
        and not _why_beside(str(key), value)
        and any(isinstance(tensor, Tensor) and tensor.dim() for tensor in value.values())
    ]
    return found[0] if len(found) == 1 else None


def _beside(content: Mapping) -> dict[str, object]:
    """Sizes that are saved beside the state dict without a config."""
    plain = {key: value for key, value in content.items() if isinstance(key, str) and key != CLASS}
    return {
        key: value
        for key, value in plain.items()
        if isinstance(value, (bool, int, float, str)) and not PROGRESS.search(key.lower())
    }


def configs_in(content: Mapping) -> list[str]:
    return [key for key in CONFIGS if isinstance(content.get(key), Mapping)]


def _why_beside(key: str, value: object) -> str | None:
    if isinstance(value, (Mapping, list)):
        return next((reason for pattern, reason in BESIDE.items() if re.search(pattern, key.lower())), None)
    return None
