"""A GPT that somebody wrote by hand, and whose parts no architecture of transformers has together.

Fledge (`convert_checkpoint.py --allow_custom_code`) puts this file and `configuration_fledge_gpt.py` beside the
weights, and transformers runs them for `from_pretrained(folder, trust_remote_code=True)`. They are the same for every
model: config.json says which parts one has. They need torch and transformers 5, and open no file and no connection.

Shapes: B rows, T tokens given, K tokens seen (T and those in the cache), D width, H heads, w width of a head.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
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


def linear(config: FledgeGPTConfig, name: str, inputs: int, outputs: int) -> nn.Linear | None:
    """The linear layer of that name, if the model has one."""
    return nn.Linear(inputs, outputs, bias=config.has(f"{name}.bias")) if config.has(f"{name}.weight") else None


class FledgeGPTNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with or without weight and bias."""

    def __init__(self, config: FledgeGPTConfig, name: str, width: int, kind: str | None = None):
        super().__init__()
        self.centred, self.eps, self.offset = (kind or config.norm) == "layernorm", config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.ones(width)) if config.has(f"{name}.weight") else None
        self.bias = nn.Parameter(torch.zeros(width)) if config.has(f"{name}.bias") else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight is None or not self.offset else self.weight + self.offset
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], weight, self.bias, self.eps)
        x = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return x if self.bias is None else x + self.bias


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


def attend_eagerly(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
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
        self.config, self.layer_idx, self.is_causal = config, layer, True
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

    def forward(self, x: Tensor, mask: Tensor | None, angles: tuple[Tensor, Tensor] | None, cache) -> Tensor:
        config = self.config
        query, key, value = self.query(x), self.key(x), self.value(x)
        if config.qk_norm == "width":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (part.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in (query, key, value))
        if config.qk_norm == "head" and not config.qk_norm_after_rope:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            query, key = (turned(part, *angles, config.rope == "interleaved") for part in (query, key))
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
        self.attention = FledgeGPTAttention(config, layer)
        moe = config.has("block.router.weight")
        self.mlp = FledgeGPTExperts(config) if moe else FledgeGPTMLP(config, "block", config.intermediate_size)
        norms = ["norm_1"] if self.parallel or self.placement != "none" else []
        norms += ["norm_2"] if config.has("block.norm_2.weight") else []
        norms += ["norm_1_after", "norm_2_after"] if self.placement == "both" and not self.parallel else []
        for name in norms:
            setattr(self, name, FledgeGPTNorm(config, f"block.{name}", config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask=None, angles=None, past_key_values=None) -> Tensor:
        def attention(x):
            return self.dropout(self.attention(x, mask, angles, past_key_values))

        def mlp(x):
            return self.dropout(self.mlp(x))

        norms = dict(self.named_children())
        second = "norm_2" if "norm_2" in norms else "norm_1"
        if self.parallel:
            return x + attention(norms["norm_1"](x)) + mlp(norms[second](x))
        for part, name, after in ((attention, "norm_1", "norm_1_after"), (mlp, second, "norm_2_after")):
            if self.placement == "pre":
                x = x + part(norms[name](x))
            elif self.placement == "post":
                x = norms[name](x + part(x))
            elif self.placement == "sublayer":
                x = x + norms[name](part(x))
            elif self.placement == "both":
                x = x + norms[after](part(norms[name](x)))
            else:
                x = x + part(x)
        return x


class FledgeGPTPreTrainedModel(PreTrainedModel):
    config: FledgeGPTConfig
    config_class = FledgeGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["FledgeGPTBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True

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
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(FledgeGPTBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.token_embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_,
    ) -> BaseModelOutputWithPast:
        config = self.config
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (config.use_cache and not self.training if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions, mask = self.look(x, attention_mask, position_ids, past)
        if config.embedding_scale != 1:
            x = x * config.embedding_scale
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        x = self.dropout(x if self.embedding_norm is None else self.embedding_norm(x))
        angles, states = self.angles(positions) if config.rope else None, [x]
        for block in self.blocks:
            x = block(x, mask, angles, past_key_values=past_key_values)
            states.append(x)
        x = x if self.final_norm is None else self.final_norm(x)
        states[-1] = x
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def look(self, x, attention_mask, position_ids, past: int) -> tuple[Tensor, Tensor | None]:
        """Each token's position (B or 1, T), and what it sees of the K tokens.

        The second is (B or 1, 1, T, K), or (…, H, T, K) and to be added to the scores with ALiBi; None where each token
        sees all before it. `attention_mask` is (B, K), with padding on either side, or (B, 1, T, K) of booleans.
        Positions that begin anew within a row, without a mask and a cache, are texts that do not see each other.
        """
        length, config = x.shape[1], self.config
        if attention_mask is not None and attention_mask.ndim == 2 and bool(attention_mask.all()):
            attention_mask = None
        keys = torch.arange(past + length, device=x.device)[None]
        if attention_mask is not None and attention_mask.ndim == 2:
            keys = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        packed = position_ids is not None and attention_mask is None and not past
        positions = keys[:, past:] if position_ids is None else position_ids
        unusual = config.visible_window or config.alibi_slopes or config.attention_cap
        ordered = (position_ids is None and not past) or length == 1
        if attention_mask is None and ordered and not unusual:
            return positions, None
        keys = positions if packed else keys
        distance = positions[:, None, :, None] - keys[:, None, None, :]
        seen = distance >= 0
        if config.visible_window:
            seen = seen & (distance < config.visible_window)
        if packed:
            text = F.pad(positions.diff(dim=-1) != 1, (1, 0)).cumsum(-1)
            seen = seen & (text[:, None, :, None] == text[:, None, None, :])
        if attention_mask is not None:
            seen = seen & (attention_mask if attention_mask.ndim == 4 else attention_mask[:, None, None, :].bool())
        seen = seen | ~seen.any(-1, keepdim=True)  # padding that sees nothing would be NaN
        if config.alibi_slopes is None:
            return positions, seen
        slopes = torch.tensor(config.alibi_slopes, device=x.device)[:, None, None].to(x.dtype)
        return positions, (-slopes * distance.abs()).masked_fill(~seen, -math.inf)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B or 1, 1, T, half of what is turned), in float32 (Su et al. 2021, eq. 34)."""
        width = self.config.rope_width or self.config.head_dim
        exponents = torch.arange(0, width, 2, device=positions.device).float() / width
        angles = positions[:, None, :, None].float() * (1 / self.config.rope_theta**exponents)
        return angles.cos(), angles.sin() * self.config.rope_direction


class FledgeGPTForCausalLM(FledgeGPTPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.token_embedding.weight"}

    def __init__(self, config: FledgeGPTConfig):
        super().__init__(config)
        self.model = FledgeGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.has("head.bias"))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
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
        logits = capped(self.lm_head(output.last_hidden_state[:, kept]), self.config.final_logit_softcapping)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        return result.to_tuple() if return_dict is False else result
