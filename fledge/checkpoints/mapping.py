"""`--mapping`: a YAML file in which the user names the roles of tensors, and facts, by hand."""

import re
from pathlib import Path
from typing import Any

from fledge.checkpoints.facts import CAPS, TOLD, Fact, Source
from fledge.checkpoints.questions import RARE
from fledge.errors import UserError

SAVED_BY_HEAD = re.compile(r"\.(query|key|value)\.(?:\{h\}|\d+)$")
OUTSIDE = {"token_embedding", "position_embedding", "embedding_norm", "final_norm", "head"}
INSIDE = {"norm_1", "qkv", "query", "key", "value", "output", "norm_2", "mlp_in", "mlp_gate", "mlp_out"}
OUTSIDE |= {"smear_gate", "smear_lambda", "backout_lambda"}
INSIDE |= {"value_embedding", "value_gate", "value_lambdas", "residual_lambdas"}
INSIDE |= {"norm_1_after", "norm_2_after", "query_norm", "key_norm", "mlp_gate_in", "attention_gain", "mlp_gain"}


def read_mapping(file: str) -> tuple[dict[str, str], dict[str, Fact]]:
    """Reads `--mapping FILE.yaml`, whose lines are `canonical module: source module` or `fact: value`.

    In both modules `{n}` stands for a layer and `{h}` for a head. `usual: true` says that the model has nothing that
    few authors have (`RARE`).

    Returns:
        source module → canonical module, and the facts by name.

    Raises:
        UserError: the file is no YAML mapping, or a key is neither a role nor a fact.
    """
    roles: dict[str, str] = {}
    facts: dict[str, Fact] = {}
    for key, value in _load(file).items():
        if key == "usual" and value is True:
            facts = {name: Fact.of(name, usual, Source.MAPPING) for name, usual in RARE.items()} | facts
        elif key in TOLD and not (key in OUTSIDE and isinstance(value, str)):
            lacks = value == "none" and (key in CAPS or key == "qk_norm")
            facts[key] = Fact.of(key, None if lacks else _number(value), Source.MAPPING)
        elif isinstance(value, str) and _is_role(key):
            if sorted(re.findall(r"\{[nh]\}", key)) != sorted(re.findall(r"\{[nh]\}", value)):
                raise UserError(
                    f"--mapping {file} says {key}: {value}; {{n}} and {{h}} stand once in both or in neither."
                )
            roles[value] = key
        else:
            raise UserError(
                f"--mapping {file} says {key}: {value}; a key is one of {', '.join(sorted(OUTSIDE))}, blocks.{{n}}. "
                f"and one of {', '.join(sorted(INSIDE))}, or one of the facts {', '.join(TOLD)}, or `usual: true`."
            )
    return roles, facts


def _load(file: str) -> dict:
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--mapping {file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date with 13 months, or 1000 brackets
        raise UserError(f"--mapping {file} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--mapping {file} holds a {type(content).__name__}, not `role: source` lines.")
    return content


def _is_role(key: object) -> bool:
    """Whether a key is the canonical name of a module; queries, keys and values may be named by head."""
    inside = re.fullmatch(r"blocks\.(?:\{n\}|\d+)\.(\w+)", re.sub(SAVED_BY_HEAD, r".\1", str(key)))
    return key in OUTSIDE or bool(inside and inside[1] in INSIDE)


def _number(value: Any) -> Any:
    """Converts numbers such as 1e-5, which YAML 1.1 reads as a string (only 1.0e-5 is a number)."""
    is_exponent = isinstance(value, str) and re.fullmatch(r"[\d.]+e[+-]?\d+", value)
    return float(value) if is_exponent else value
