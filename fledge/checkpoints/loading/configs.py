"""Configs that code bases write into a file of their own beside the weights, and where each entry is from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.cli import read_json
from fledge.errors import UserError

PICKLED = "attribute of the pickled module"
LITGPT_MLPS = {"LLaMAMLP": "silu", "LLaMAMoE": "silu"}
"""The activation of litgpt's MLPs; all others have a GELU, as `gelu_approximate` says."""


def read_config_beside(file: Path) -> tuple[dict[str, object], str]:
    """The config in the file that nanochat, litgpt or lingua writes beside its weights, and that file's name.

    Raises:
        UserError: it is there and holds no mapping.
    """
    if number := re.fullmatch(r"model_(\d+)\.pt", file.name):  # nanochat
        beside, inner = file.with_name(f"meta_{number[1]}.json"), "model_config"
    elif file.name == "lit_model.pth":
        beside, inner = file.with_name("model_config.yaml"), None
    elif file.name.startswith("consolidated"):  # lingua, and Meta's own
        beside, inner = file.with_name("params.json"), "model"
    else:
        return {}, ""
    if not beside.is_file():
        return {}, ""
    content = _read_yaml(beside) if beside.suffix == ".yaml" else read_json(beside, "the script that saved it")
    if not isinstance(content, dict):
        raise UserError(f"{beside} holds a {type(content).__name__}, not a mapping.")
    inside = content.get(inner)
    return (inside if isinstance(inside, dict) else content), beside.name


def is_no_model(file: Path) -> bool:
    """Whether a file beside nanochat's weights, which looks like a checkpoint, holds something else."""
    return file.name == "token_bytes.pt" or bool(re.fullmatch(r"optim_\d+(_rank\d+)?\.pt", file.name))


def _read_yaml(file: Path) -> object:
    import yaml

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error


def stated_by_litgpt(config: Mapping[str, Any]) -> dict[str, object]:
    """The facts that a litgpt config states in words of its own; nothing for any other config."""
    if not {"norm_class_name", "mlp_class_name", "n_head", "n_embd"} <= config.keys():
        return {}
    head = config.get("head_size") or config["n_embd"] // config["n_head"]
    turned = int(config.get("rotary_percentage", 0.25) * head)
    tanh = config.get("gelu_approximate") == "tanh"
    facts: dict[str, object] = {
        "activation": LITGPT_MLPS.get(config["mlp_class_name"], "gelu_tanh" if tanh else "gelu"),
        "norm": str(config["norm_class_name"]).lower(),
        "parallel": bool(config.get("parallel_residual", True)),
        "rope_width": None if turned == head else turned,
        "embedding_scale": config["n_embd"] ** 0.5 if config.get("scale_embeddings") else 1.0,
        "attention_scale": (config.get("attention_scores_scalar") or head) ** -0.5,
        "attention_cap": config.get("attention_logit_softcapping"),
        "logit_cap": config.get("final_logit_softcapping"),
        "window": config.get("sliding_window_size"),
    }
    if not config.get("norm_qk"):
        facts["qk_norm"] = None
    if facts["norm"] == "rmsnorm" and "Gemma" in str(config.get("name")):
        facts["norm_offset"] = 1.0
    return facts


def origins(levels: list[Mapping], configs: tuple[str, ...], pickled: bool) -> dict[str, str]:
    """Where each entry of a config is from: a mapping in the file, by its name, or the file itself."""
    found: dict[str, str] = {}
    for content in levels:
        found |= {str(key): "an entry of the file" for key in content if str(key) not in found}
        for name in configs:
            if isinstance(content.get(name), Mapping):
                found |= dict.fromkeys(map(str, content[name]), PICKLED if pickled else f"{name} in the file")
    return found
