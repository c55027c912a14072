"""The config of `modeling_fledge_gpt.py`, which lies beside it and says what both are."""

from typing import ClassVar

from transformers import PreTrainedConfig


class FledgeGPTConfig(PreTrainedConfig):
    """What there is to say about one model.

    parameters: names of the weights and biases that it has, those of a block as `block.query.weight`, and those of an
        expert as `block.experts.mlp_in.weight`. A linear layer that is not named here is not there.
    norm, qk_norm_type: layernorm or rmsnorm; `norm_offset` is added to the weight of each norm. `norm_unbiased` divides
        by D − 1 in LayerNorm's variance, `norm_eps_outside` adds the epsilon to the root; `final_norm_eps` and
        `qk_norm_eps` are other epsilons than `norm_eps`.
    norm_placement: pre, x + f(norm(x)); post, norm(x + f(x)); sublayer, x + norm(f(x)); both, x + norm'(f(norm(x)));
        replace, y + f(y) where y is norm(x); none. `norm_2` that is not named is `norm_1` once more.
    parallel: x + attention(norm_1(x)) + mlp(norm_2(x)), instead of one after the other.
    rope: interleaved (neighbours turn together), half (i and i + half a head), or None; the first `rope_width`
        coordinates of a head are turned, and the other way round if `rope_direction` is −1. With a `rope_span` of
        "width" all heads together are turned as one.
    qk_norm: queries and keys are normalised over each head ("head"), over all heads together ("width"), or not at all.
    alibi_slopes: a key at distance d is scored d times its head's slope lower.
    attention_cap, final_logit_softcapping: c · tanh(x / c) of scores and of logits.
    visible_window: how many tokens each one sees, itself included. (Its name keeps transformers' cache whole.)
    window_pattern: a letter for each block, S where the window holds and L where it does not; None for S everywhere.
    value_layers: the blocks that add an embedding of the token to its value, times `value_gate_factor` times a gate
        that reads the first `value_gate_width` coordinates, if there is one.
    smear_width: coordinates of an embedding that say how much of the embedding before it is added to it.
    residual_scale: what attention and MLP add to the residual stream is multiplied by it; with a `residual_scaled` of
        "attention", "mlp" or "stream", that one alone. `logit_scale` multiplies logits before they are capped.
    backout_layer: the block after which the stream is, times a learned number, taken off again at the end.
    intermediate_sizes: the widths of the blocks' MLPs, where they differ.
    experts_per_token, renormalise_experts: how many experts share a token, and whether their shares sum to one.
    """

    model_type = "fledge_gpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 16
    intermediate_size: int = 256
    intermediate_sizes: list[int] | None = None
    shared_intermediate_size: int = 0
    num_experts: int = 0
    max_position_embeddings: int = 128
    parameters: list[str] | None = None
    activation: str = "gelu"
    attention_scale: float = 0.25
    attention_cap: float | None = None
    visible_window: int | None = None
    window_pattern: str | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_unbiased: bool = False
    norm_eps_outside: bool = False
    final_norm_eps: float | None = None
    qk_norm_eps: float | None = None
    norm_placement: str = "pre"
    parallel: bool = False
    final_norm: bool = True
    embedding_norm: bool = False
    rope: str | None = None
    rope_theta: float = 10_000.0
    rope_direction: int = 1
    rope_width: int | None = None
    rope_span: str = "head"
    alibi_slopes: list[float] | None = None
    qk_norm: str | None = None
    qk_norm_type: str = "rmsnorm"
    qk_norm_after_rope: bool = False
    value_layers: list[int] | None = None
    value_gate_width: int = 0
    value_gate_factor: float = 1.0
    smear_width: int = 0
    backout_layer: int | None = None
    experts_per_token: int = 0
    renormalise_experts: bool = True
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    residual_scaled: str = "both"
    logit_scale: float = 1.0
    final_logit_softcapping: float | None = None
    dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def has(self, name: str) -> bool:
        return name in (self.parameters or ())
