"""Which parameters train: all, all but the frozen ones, or an adapter's."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as AdaptedLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from fledge.errors import UserError
from fledge.models import embedding_of

LINEAR = (torch.nn.Linear, Conv1D)


def without_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that an adapter is put into, with its layers in place; or the model itself if it has none."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def merged(model: PreTrainedModel) -> Iterator[None]:
    """Inside, linear layers have their adapters in their weights, which saves two products each.

    A layer that shares its weights keeps its adapter apart. Afterwards all weights are exactly those of before.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    layers = [part for part in model.modules() if isinstance(part, AdaptedLinear)]
    adapted = [part for part in layers if uses[id(part.get_base_layer().weight)] == 1]
    before = [(parameter, parameter.data) for part in adapted for parameter in part.get_base_layer().parameters()]
    try:
        for part in adapted:
            part.merge(safe_merge=True)  # into new tensors
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
        for part in adapted:
            part.merged_adapters.clear()


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The transformer blocks, in order."""
    count = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)


def freeze(model: PreTrainedModel, layers: int, modules: list[str], new_tokens: int) -> None:
    """Freezes the first `layers` blocks and the embeddings, or the last -`layers` blocks, and named modules.

    A module is named by its path or by the end of it: `wte`, `mlp`, `h.0.attn`. Embeddings are not frozen if the
    template added `new_tokens`, because their rows are still untrained.

    Raises:
        UserError: a module does not exist, there are not that many blocks, or nothing is left to train.
    """
    blocks = list(blocks_of(model))
    if abs(layers) > len(blocks):
        raise UserError(f"--freeze_layers {layers} asks for more than the model's {len(blocks)} blocks; give fewer.")
    frozen = blocks[:layers] if layers >= 0 else blocks[layers:]
    paths = dict(model.named_modules())
    if layers > 0 and not new_tokens:
        frozen += [m for m in model.base_model.children() if isinstance(m, torch.nn.Embedding)]
    for name in modules:
        found = [module for path, module in paths.items() if f".{path}".endswith(f".{name}") and path]
        if not found:
            names = sorted({path.rpartition(".")[2] for path in paths} - {""} - {str(n) for n in range(len(blocks))})
            raise UserError(f"--freeze_modules {name} names nothing in this model; it has {', '.join(names)}.")
        frozen += found
    for module in frozen:
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("Everything is frozen; freeze fewer layers or modules.")


def adapter_config(arguments: ModelConfig, model: PreTrainedModel, new_tokens: int) -> LoraConfig | None:
    """LoRA or DoRA as `arguments` ask for it, on every linear layer of the blocks unless they name others.

    Adapting all of them matches full fine-tuning where attention alone does not (https://arxiv.org/abs/2305.14314,
    section 4). Rows of the embedding and of the head that belong to `new_tokens` are trained beside the adapter.

    Raises:
        UserError: --lora_target_modules names nothing in the model.
    """
    config = get_peft_config(arguments)
    if not isinstance(config, LoraConfig):
        return None
    if targets := arguments.lora_target_modules:
        config.target_modules = _targets([targets] if isinstance(targets, str) else targets, model)
    elif config.target_parameters is None:
        config.target_modules = "all-linear"
    if new_tokens:
        rows = embedding_of(model).num_embeddings
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names = [name for name, module in model.named_modules() if module in ends]
        config.trainable_token_indices = {name: list(range(rows - new_tokens, rows)) for name in names}
    return config


def _targets(named: list[str], model: PreTrainedModel) -> str | list[str]:
    """What peft takes for `all-linear`, one regular expression of whole paths, or ends of paths.

    peft passes over a name that is not there, as long as another one is.

    Raises:
        UserError: a name is not there.
    """
    paths = [path for path, _ in model.named_modules() if path]
    for name in named:
        if any(f".{path}".endswith(f".{name}") for path in paths):
            continue
        if len(named) == 1 and (name == "all-linear" or _matches(name, paths)):
            return name
        linear = {path.rpartition(".")[2] for path, layer in model.named_modules() if isinstance(layer, LINEAR)}
        raise UserError(
            f"--lora_target_modules {name} names nothing in this model; its linear layers are "
            f"{', '.join(sorted(linear))}."
        )
    return named


def _matches(pattern: str, paths: list[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, path) for path in paths)
    except re.error:
        return False


def trained_share(model: torch.nn.Module) -> str:
    """A line that says how many of the parameters train."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"Training {trained:,} of {total:,} parameters ({trained / total:.1%})"


def adapter_record(model: torch.nn.Module) -> dict | None:
    """The adapter's settings for `run.json`; `None` if there is no adapter."""
    if not isinstance(model, PeftModel):
        return None
    config = cast(LoraConfig, model.peft_config["default"])
    config.base_model_name_or_path = ""  # else a path of this machine
    kind = "DoRA" if config.use_dora else "LoRA"
    targets = sorted(config.target_modules or [])
    return {"kind": kind, "r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "targets": targets}
