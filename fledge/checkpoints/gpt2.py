"""The canonical GPT as a `GPT2LMHeadModel`, exactly: what GPT-2 seems unable to hold is folded into what it has."""

import torch
from torch import Tensor
from transformers import GPT2Config

from fledge.checkpoints.canonical import CanonicalGPT

ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}


def to_gpt2(gpt: CanonicalGPT, token_ids: dict[str, int]) -> tuple[GPT2Config, dict[str, Tensor], list[str]]:
    """Returns the config, the state dict (float64) and one sentence for each fold that was needed.

    Args:
        gpt: the model to represent.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for the config.
    """
    source, width = gpt.tensors, gpt.width
    final_norm_weight = source["final_norm.weight"]
    final_norm_bias = source.get("final_norm.bias", torch.zeros(width, dtype=torch.float64))
    head, folds = source["head.weight"], []
    tied = gpt.tied
    if "head.bias" in source:
        head, final_norm_weight, final_norm_bias = fold_head_bias(
            head, source["head.bias"], final_norm_weight, final_norm_bias
        )
        tied = False
        folds.append("The head's bias is carried by one coordinate of the final norm, which the other ones determine.")
    if not any(name.startswith("blocks.0.") and name.endswith("output.weight") for name in source):
        folds.append("The missing attention output projection is an identity.")
    usual_scale = (width // gpt.n_head) ** -0.5
    if gpt.attention_scale != usual_scale:
        folds.append(f"The attention scale {gpt.attention_scale:g} instead of {usual_scale:g} is in the queries.")

    target = {
        "transformer.wte.weight": source["token_embedding.weight"],
        "transformer.wpe.weight": source["position_embedding.weight"],
        "transformer.ln_f.weight": final_norm_weight,
        "transformer.ln_f.bias": final_norm_bias,
        "lm_head.weight": head,
    }
    for n in range(gpt.n_layer):
        block, into = f"blocks.{n}", f"transformer.h.{n}"

        def weight(role: str, block=block) -> Tensor:
            return source.get(f"{block}.{role}.weight", torch.eye(width, dtype=torch.float64))

        def bias(role: str, block=block) -> Tensor:
            return source.get(f"{block}.{role}.bias", torch.zeros(len(weight(role, block)), dtype=torch.float64))

        scale = gpt.attention_scale / usual_scale
        # GPT-2's Conv1D holds (in, out).
        target[f"{into}.attn.c_attn.weight"] = torch.cat([weight("query") * scale, weight("key"), weight("value")]).T
        target[f"{into}.attn.c_attn.bias"] = torch.cat([bias("query") * scale, bias("key"), bias("value")])
        for role, name in (("output", "attn.c_proj"), ("mlp_in", "mlp.c_fc"), ("mlp_out", "mlp.c_proj")):
            target[f"{into}.{name}.weight"] = weight(role).T
            target[f"{into}.{name}.bias"] = bias(role)
        for role, name in (("norm_1", "ln_1"), ("norm_2", "ln_2")):
            target[f"{into}.{name}.weight"] = weight(role)
            target[f"{into}.{name}.bias"] = bias(role)

    if any(f"blocks.0.{role}.bias" not in source for role in ("query", "output", "mlp_in", "norm_1")):
        folds.append("Biases that the source does not have are zeros.")
    mlp_width = source["blocks.0.mlp_in.weight"].shape[0]
    config = GPT2Config(
        vocab_size=gpt.vocab_size,
        n_positions=gpt.context_length,
        n_ctx=gpt.context_length,  # llama.cpp's converter reads this name
        n_embd=width,
        n_layer=gpt.n_layer,
        n_head=gpt.n_head,
        n_inner=None if mlp_width == 4 * width else mlp_width,
        activation_function=ACTIVATION_NAMES[gpt.activation],
        layer_norm_epsilon=gpt.norm_eps,
        # A short fine-tuning is better without dropout; a long one may raise these in config.json.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=tied,
        **token_ids,
    )
    return config, {name: tensor.contiguous() for name, tensor in target.items()}, folds


def fold_head_bias(
    head: Tensor, head_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves the bias of an untied head (V, D) into the final LayerNorm, exactly.

    The normalised x̂ sums to zero, so x̂_j = −Σ_{i≠j} x̂_i for any j and that coordinate is free to carry a constant:

        logits = Σ_i w_i (γ_i x̂_i + β_i) + b
               = Σ_{i≠j} (w_i γ_i − w_j γ_j) x̂_i + (b + Σ_i w_i β_i)

    which is a head w' behind a norm with γ'_i = 1, β'_i = 0 for i ≠ j and γ'_j = 0, β'_j = 1. The gains go into the
    head, so nothing is divided by one that training drove to zero. j is where the subtraction loses least.

    Returns:
        w' (V, D), γ' (D,), β' (D,), in the precision given.
    """
    j = int((norm_weight.abs() * head.norm(dim=0)).argmin())
    folded = head * norm_weight - (head[:, j] * norm_weight[j])[:, None]
    folded[:, j] = head_bias + head @ norm_bias
    new_weight, new_bias = torch.ones_like(norm_weight), torch.zeros_like(norm_bias)
    new_weight[j], new_bias[j] = 0, 1
    return folded, new_weight, new_bias
