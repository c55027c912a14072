"""A GPT that somebody wrote by hand, and whose parts no architecture of transformers has together.

Fledge (`convert_checkpoint.py --allow_custom_code`) puts this file and `configuration_fledge_gpt.py` beside the
weights, and transformers runs them for `from_pretrained(folder, trust_remote_code=True)`. They are the same for every
model: config.json says which parts one has. They need torch and transformers 5, and open no file and no connection.

Shapes: B rows, T tokens given, K tokens seen (T and those in the cache), D width, H heads, w width of a head.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_fledge_gpt import FledgeGPTConfig

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}

OF_QUERIES = ("block.query_norm", "block.key_norm")


def linear(config: FledgeGPTConfig, name: str, inputs: int, outputs: int) -> Any:
    """The `nn.Linear` of that name, or None if the model has none."""
    return nn.Linear(inputs, outputs, bias=config.has(f"{name}.bias")) if config.has(f"{name}.weight") else None


def lambdas(config: FledgeGPTConfig, name: str, count: int) -> nn.Parameter | None:
    """Learned numbers of that name, if the model has them."""
    return nn.Parameter(torch.ones(count)) if config.has(f"{name}.weight") else None


class FledgeGPTNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with or without weight and bias."""

    def __init__(self, config: FledgeGPTConfig, name: str, width: int, kind: str | None = None):
        super().__init__()
        self.centred, self.offset = (kind or config.norm) == "layernorm", config.norm_offset
        self.unbiased, self.eps_outside = self.centred and config.norm_unbiased, config.norm_eps_outside
        own = config.final_norm_eps if name == "final_norm" else config.qk_norm_eps if name in OF_QUERIES else None
        self.eps = config.norm_eps if own is None else own
        self.weight = nn.Parameter(torch.ones(width)) if config.has(f"{name}.weight") else None
        self.bias = nn.Parameter(torch.zeros(width)) if config.has(f"{name}.bias") else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight is None or not self.offset else self.weight + self.offset
        if self.unbiased or self.eps_outside:
            return self.written_out(x, weight)
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], weight, self.bias, self.eps)
        x = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return x if self.bias is None else x + self.bias

    def written_out(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """With D − 1 in the variance's denominator, or the epsilon beside the root."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        variance = wide.square().sum(-1, keepdim=True) / (x.shape[-1] - self.unbiased)
        # Where all coordinates are equal, the root has no gradient.
        root = variance.clamp_min(1e-30).sqrt() + self.eps if self.eps_outside else (variance + self.eps).sqrt()
        x = (wide / root).to(x.dtype)
        x = x if weight is None else x * weight
        return x if self.bias is None else x + self.bias


def scaled(scale: float, x: Tensor) -> Tensor:
    return x if scale == 1 else scale * x


def capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`x` (B, H, T, w) with its first coordinates turned by angles (B, 1, T, half of them)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    pairs = a * cos - b * sin, a * sin + b * cos
    x = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([x, rest], dim=-1)


def attend_eagerly(
    module: "FledgeGPTAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, which alone can cap its scores: (B, H, T, w) → (B, T, H, w)."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = capped(query @ key.transpose(-1, -2) * scaling, module.config.attention_cap)
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        hidden = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -math.inf) if hidden else scores + attention_mask
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ value).transpose(1, 2), weights


class FledgeGPTAttention(nn.Module):
    def __init__(self, config: FledgeGPTConfig, layer: int):
        super().__init__()
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        # The first layer of the cache holds embeddings, if each token is mixed with the one before it.
        self.config, self.layer_idx, self.is_causal = config, layer + bool(config.smear_width), True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.query = linear(config, "block.query", config.hidden_size, queries)
        self.key = linear(config, "block.key", config.hidden_size, keys)
        self.value = linear(config, "block.value", config.hidden_size, keys)
        self.output = linear(config, "block.output", queries, config.hidden_size)
        if config.qk_norm:
            widths = (config.head_dim,) * 2 if config.qk_norm == "head" else (queries, keys)
            self.query_norm, self.key_norm = (
                FledgeGPTNorm(config, f"block.{name}", width, config.qk_norm_type)
                for name, width in zip(("query_norm", "key_norm"), widths, strict=True)
            )

        own = layer in (config.value_layers or ())
        self.value_embedding = nn.Embedding(config.vocab_size, keys) if own else None
        gate_width = config.value_gate_width
        self.value_gate = linear(config, "block.value_gate", gate_width, config.num_key_value_heads) if own else None
        self.value_lambdas = lambdas(config, "block.value_lambdas", 2) if own else None

    def with_value_embedding(self, x: Tensor, value: Tensor, ids: Tensor | None) -> Tensor:
        """Adds to each token's value (B, T, K) an embedding of the token (Zhou et al. 2024), gated for each head."""
        if ids is None:
            raise ValueError("This model has value embeddings, which need input_ids and not inputs_embeds.")
        assert self.value_embedding is not None
        added = self.value_embedding(ids)
        if self.value_gate is not None:
            gate = self.config.value_gate_factor * self.value_gate(x[..., : self.config.value_gate_width]).sigmoid()
            added = (added.unflatten(-1, (-1, self.config.head_dim)) * gate[..., None]).flatten(-2)
        if self.value_lambdas is not None:
            value, added = self.value_lambdas[0] * value, self.value_lambdas[1] * added
        return value + added

    def forward(self, x: Tensor, ids: Tensor | None, mask: Tensor | None, angles: Any, cache: Cache | None) -> Tensor:
        config = self.config
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.value_embedding is not None:
            value = self.with_value_embedding(x, value, ids)
        if config.qk_norm == "width":
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None and config.rope_span == "width":
            query, key = (
                turned(part[:, None], cos, sin, config.rope == "interleaved")[:, 0]
                for part, (cos, sin) in zip((query, key), angles, strict=True)
            )
        query, key, value = (part.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in (query, key, value))
        if config.qk_norm == "head" and not config.qk_norm_after_rope:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None and config.rope_span == "head":
            query, key = (
                turned(part, cos, sin, config.rope == "interleaved")
                for part, (cos, sin) in zip((query, key), angles, strict=True)
            )
        if config.qk_norm == "head" and config.qk_norm_after_rope:
            query, key = self.query_norm(query), self.key_norm(key)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(getattr(config, "_attn_implementation", "eager"), attend_eagerly)
        attend = attend if config.attention_cap is None else attend_eagerly
        dropout = config.dropout if self.training else 0.0
        mixed, _ = attend(self, query, key, value, mask, scaling=config.attention_scale, dropout=dropout)
        mixed = mixed.flatten(2)
        return mixed if self.output is None else self.output(mixed)


class FledgeGPTMLP(nn.Module):
    """activation(in(x)), gated or not, and out of its width again if there is an `mlp_out`."""

    def __init__(self, config: FledgeGPTConfig, place: str, width: int):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.mlp_gate = linear(config, f"{place}.mlp_gate", config.hidden_size, width)
        self.mlp_in = linear(config, f"{place}.mlp_in", config.hidden_size, width)
        self.mlp_out = linear(config, f"{place}.mlp_out", width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        opened = self.mlp_in(x)
        x = self.activation(opened) if self.mlp_gate is None else self.activation(self.mlp_gate(x)) * opened
        return x if self.mlp_out is None else self.mlp_out(x)


class FledgeGPTExperts(nn.Module):
    """A mixture of MLPs (Jiang et al. 2024, section 2.1), and one that every token goes through, if there is one."""

    def __init__(self, config: FledgeGPTConfig):
        super().__init__()
        self.count, self.renormalise = config.experts_per_token, config.renormalise_experts
        self.router = linear(config, "block.router", config.hidden_size, config.num_experts)
        experts = range(config.num_experts)
        self.experts = nn.ModuleList(FledgeGPTMLP(config, "block.experts", config.intermediate_size) for _ in experts)
        shared = config.has("block.shared.mlp_in.weight")
        self.shared = FledgeGPTMLP(config, "block.shared", config.shared_intermediate_size) if shared else None
        self.shared_gate = linear(config, "block.shared_gate", config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x).softmax(-1).topk(self.count, dim=-1)
        if self.renormalise:
            shares = shares / shares.sum(-1, keepdim=True)
        mixed = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            places = (chosen == i).any(-1)
            share = (shares * (chosen == i)).sum(-1, keepdim=True)[places]
            mixed = mixed.masked_scatter(places[..., None], mixed[places] + share * expert(x[places]))
        if self.shared is None:
            return mixed
        shared = self.shared(x)
        return mixed + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)


class FledgeGPTBlock(GradientCheckpointingLayer):
    def __init__(self, config: FledgeGPTConfig, layer: int):
        super().__init__()
        self.placement, self.parallel = config.norm_placement, config.parallel
        scaled = ("attention", "mlp") if config.residual_scaled == "both" else (config.residual_scaled,)
        self.scales = [config.residual_scale if part in scaled else 1.0 for part in ("attention", "mlp", "stream")]
        self.attention = FledgeGPTAttention(config, layer)
        width = config.intermediate_sizes[layer] if config.intermediate_sizes else config.intermediate_size
        moe = config.has("block.router.weight")
        self.mlp = FledgeGPTExperts(config) if moe else FledgeGPTMLP(config, "block", width)
        self.residual_lambdas = lambdas(config, "block.residual_lambdas", 2)
        norms = ["norm_1"] if self.parallel or self.placement != "none" else []
        norms += ["norm_2"] if config.has("block.norm_2.weight") else []
        norms += ["norm_1_after", "norm_2_after"] if self.placement == "both" and not self.parallel else []
        for name in norms:
            setattr(self, name, FledgeGPTNorm(config, f"block.{name}", config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        first: Tensor,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        angles: tuple | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """`first` is what the first block was given, of which this one may read a share."""

        of_attention, of_mlp, of_stream = self.scales

        def attention(x: Tensor) -> Tensor:
            return self.dropout(self.attention(x, ids, mask, angles, past_key_values))

        def mlp(x: Tensor) -> Tensor:
            return self.dropout(self.mlp(x))

        if self.residual_lambdas is not None:
            x = self.residual_lambdas[0] * x + self.residual_lambdas[1] * first
        norms = dict(self.named_children())
        second = "norm_2" if "norm_2" in norms else "norm_1"
        if self.parallel:
            mixed = scaled(of_attention, attention(norms["norm_1"](x))) + scaled(of_mlp, mlp(norms[second](x)))
            return scaled(of_stream, x) + mixed
        parts = (attention, of_attention, "norm_1", "norm_1_after"), (mlp, of_mlp, second, "norm_2_after")
        for part, scale, name, after in parts:
            x = norms[name](x) if self.placement == "replace" else x
            h = part(norms[name](x) if self.placement in ("pre", "both") else x)
            if self.placement in ("sublayer", "both"):
                h = norms[after if self.placement == "both" else name](h)
            x = scaled(of_stream, x) + scaled(scale, h)
            x = norms[name](x) if self.placement == "post" else x
        return x


class FledgeGPTPreTrainedModel(PreTrainedModel):
    config: FledgeGPTConfig
    config_class = FledgeGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FledgeGPTBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, FledgeGPTNorm) and module.weight is not None:
            nn.init.constant_(module.weight, 1 - module.offset)
        if isinstance(module, (nn.Linear, FledgeGPTNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class FledgeGPTModel(FledgeGPTPreTrainedModel):
    def __init__(self, config: FledgeGPTConfig):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        places = config.max_position_embeddings if config.has("position_embedding.weight") else None
        self.position_embedding = nn.Embedding(places, config.hidden_size) if places else None
        self.embedding_norm, self.final_norm = (
            FledgeGPTNorm(config, name, config.hidden_size) if wanted else None
            for name, wanted in (("embedding_norm", config.embedding_norm), ("final_norm", config.final_norm))
        )
        self.smear_gate = linear(config, "smear_gate", config.smear_width, 1)
        self.smear_lambda = lambdas(config, "smear_lambda", 1)
        self.backout_lambda = lambdas(config, "backout_lambda", 1)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(FledgeGPTBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_embedding = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        config = self.config
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (config.use_cache and not self.training if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is not None and attention_mask.ndim == 2 and bool(attention_mask.all()):
            attention_mask = None
        positions, keys = self.places(x, attention_mask, position_ids, past)
        masks = [
            self.look(x, attention_mask, positions, keys, position_ids is not None, past, window)
            for window in ([None, config.visible_window] if config.window_pattern else [config.visible_window])
        ]
        x = scaled(config.embedding_scale, x)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        x = x if self.smear_gate is None else self.smeared(x, positions, keys, past, past_key_values)
        x = self.dropout(x)
        angles, states, backed_out = self.angles(positions) if config.rope else None, [x], None
        for n, block in enumerate(self.blocks):
            mask = masks[0 if config.window_pattern and config.window_pattern[n] == "L" else -1]
            x = block(x, states[0], input_ids, mask, angles, past_key_values=past_key_values)
            states.append(x)
            backed_out = x if n == config.backout_layer else backed_out
        if backed_out is not None:
            x = x - self.backout_lambda * backed_out
        x = x if self.final_norm is None else self.final_norm(x)
        states[-1] = x
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def places(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int
    ) -> tuple[Tensor, Tensor]:
        """The position of each token given (B or 1, T), and of each seen (B or 1, K), with padding on either side."""
        keys = torch.arange(past + x.shape[1], device=x.device)[None]
        if attention_mask is not None and attention_mask.ndim == 2:
            keys = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return keys[:, past:] if position_ids is None else position_ids, keys

    def look(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        keys: Tensor,
        given: bool,
        past: int,
        window: int | None,
    ) -> Tensor | None:
        """What each token sees of the K tokens: (B or 1, 1, T, K), or (…, H, T, K) and to be added to the scores with
        ALiBi; None where each token sees all before it.

        `attention_mask` is (B, K), or (B, 1, T, K) of booleans. Positions that were `given` and begin anew in a row,
        without a mask and a cache, are texts that do not see each other.
        """
        config = self.config
        packed = given and attention_mask is None and not past
        ordered = not (given or past) or x.shape[1] == 1
        if attention_mask is None and ordered and not (window or config.alibi_slopes or config.attention_cap):
            return None
        keys = positions if packed else keys
        distance = positions[:, None, :, None] - keys[:, None, None, :]
        seen = distance >= 0
        if window:
            seen = seen & (distance < window)
        if packed:
            text = F.pad(positions.diff(dim=-1) != 1, (1, 0)).cumsum(-1)
            seen = seen & (text[:, None, :, None] == text[:, None, None, :])
        if attention_mask is not None:
            seen = seen & (attention_mask if attention_mask.ndim == 4 else attention_mask[:, None, None, :].bool())
        seen = seen | ~seen.any(-1, keepdim=True)  # padding that sees nothing would be NaN
        if config.alibi_slopes is None:
            return seen
        slopes = torch.tensor(config.alibi_slopes, device=x.device)[:, None, None].to(x.dtype)
        return (-slopes * distance.abs()).masked_fill(~seen, -math.inf)

    def smeared(self, x: Tensor, positions: Tensor, keys: Tensor, past: int, cache: Cache | None) -> Tensor:
        """Adds to each embedding (B, T, D) a share of the one before it; a text's first token has none before it."""
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        if cache is not None:
            if len(cache.layers) == self.config.num_hidden_layers:  # made for the attention's layers alone
                cache.layers.append(DynamicLayer())
            held, _ = cache.update(x[:, None], x[:, None], 0)
            if past:  # the last place of the position before: padding on the left counts as position 0 too
                keys = keys[:, : held.shape[2]].expand(len(x), -1)
                number = torch.arange(1, keys.shape[1] + 1, device=x.device)
                place = ((keys == positions[:, :1] - 1) * number).argmax(-1)
                last = held[torch.arange(len(x), device=x.device), 0, place]
                before = torch.cat([last[:, None], before[:, 1:]], dim=1)
        share = self.smear_lambda * self.smear_gate(x[..., : self.config.smear_width]).sigmoid()
        return x + share * (positions > 0)[..., None] * before

    def angles(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of queries and of keys, cosines and sines (B or 1, 1, T, half of what is turned), in float32.

        Su et al. 2021, eq. 34.
        """
        config = self.config
        heads = (config.num_attention_heads, config.num_key_value_heads)
        widths = [n * config.head_dim for n in heads] if config.rope_span == "width" else [config.rope_width] * 2
        tables = {}
        for width in {width or config.head_dim for width in widths}:
            exponents = torch.arange(0, width, 2, device=positions.device).float() / width
            angles = positions[:, None, :, None].float() * (1 / config.rope_theta**exponents)
            tables[width] = angles.cos(), angles.sin() * config.rope_direction
        return [tables[width or config.head_dim] for width in widths]


class FledgeGPTForCausalLM(FledgeGPTPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.token_embedding.weight"
    }

    def __init__(self, config: FledgeGPTConfig):
        super().__init__(config)
        self.model = FledgeGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.has("head.bias"))
        self.post_init()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Value embeddings have a row for each token too; those of new ones are zero."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for block in self.model.blocks:
            if (old := block.attention.value_embedding) is not None:
                new = nn.Embedding(embedding.num_embeddings, old.embedding_dim, dtype=old.weight.dtype)
                kept = min(new.num_embeddings, old.num_embeddings)
                with torch.no_grad():
                    new.weight.zero_()[:kept] = old.weight[:kept].to(new.weight.device)
                block.attention.value_embedding = new.to(old.weight.device)
        return embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scaled(self.config.logit_scale, self.lm_head(output.last_hidden_state[:, kept]))
        logits = capped(logits, self.config.final_logit_softcapping)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        return result.to_tuple() if return_dict is False else result
