"""A canonical GPT as a model of transformers: made, proven, saved, and proven again as it was saved."""

import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from fledge.checkpoints.canonical import CanonicalGPT
from fledge.checkpoints.custom import represent
from fledge.checkpoints.proof import (
    Probes,
    probes_of,
    prove_exact,
    prove_greedy,
    prove_saved,
    prove_written,
    rounding,
)
from fledge.custom import FledgeGPTConfig, open_as_strangers_do
from fledge.guards import borrow
from fledge.sampling import Sampling


@dataclass
class Converted:
    """The model of transformers, on the meta device until it is saved, and its weights.

    `folds` are sentences about what was rewritten. With `has_own_code` the class is Fledge's. `probes` are token ids
    with the canonical GPT's logits, which the model must reproduce, and `rounding` is their error in float32.
    """

    gpt: CanonicalGPT
    tokenizer: PreTrainedTokenizerFast
    model: PreTrainedModel
    weights: dict[str, Tensor]
    folds: list[str]
    has_own_code: bool
    probes: Probes = field(default_factory=list)
    rounding: float = 0.0

    @classmethod
    def of(
        cls, gpt: CanonicalGPT, tokenizer: PreTrainedTokenizerFast, target: str, allow_custom_code: bool
    ) -> "Converted":
        """Represents `gpt` as a class of transformers.

        Raises:
            UserError: see `represent`.
        """
        config, weights, folds = represent(gpt, token_ids(tokenizer), target, allow_custom_code)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return cls(gpt, tokenizer, model, weights, folds, isinstance(config, FledgeGPTConfig))

    def prove(self) -> float:
        """Proves in float64 that the model computes what the GPT does; see `prove_exact`. Returns the largest error."""
        self.probes = probes_of(self.gpt)
        error = prove_exact(self.probes, self.model, self.weights, self.folds)
        self.rounding = rounding(self.gpt, self.probes)
        return error

    def save(self, folder: Path) -> int:
        """Writes the model in float32 with its tokenizer. Returns how many greedy tokens were proven before that."""
        for name in self.weights:  # one at a time, so that each float64 tensor is freed at once
            self.weights[name] = self.weights[name].float().contiguous()
        self.model.load_state_dict(self.weights, assign=True, strict=False)
        self.model.tie_weights()
        greedy_tokens = prove_greedy(self.gpt, self.model)
        ids = {name: i for name, i in token_ids(self.tokenizer).items() if i is not None}
        # The same decoding as the tuned model's, so that base and model can be compared.
        self.model.generation_config = GenerationConfig(**ids, **Sampling().decoding())
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return greedy_tokens

    def prove_written(self, folder: Path) -> None:
        """Proves that the file in `folder` holds the model's tensors."""
        revert_weight_conversion = borrow("transformers.core_model_loading", "revert_weight_conversion")
        prove_written(folder / "model.safetensors", revert_weight_conversion(self.model, self.weights))

    def prove_saved(self, folder: Path) -> dict[str, float]:
        """Opens the saved folder and proves that its model computes the same in float32; see `proof.prove_saved`.

        Frees the GPT and the model before, so that memory holds one model at a time.
        """
        del self.gpt, self.model, self.weights
        gc.collect()
        opened = open_as_strangers_do(folder) if self.has_own_code else AutoModelForCausalLM.from_pretrained(folder)
        return prove_saved(self.probes, opened, self.rounding)


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
