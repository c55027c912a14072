"""Random canonical GPTs with any of the features that hand-written ones differ in."""

import torch
from hypothesis import strategies as st

from fledge.checkpoints.canonical import (
    ACTIVATIONS,
    NORMS,
    PLACEMENTS,
    QK_NORMS,
    ROTATIONS,
    SCALED,
    SPANS,
    CanonicalGPT,
)

VOCAB, CONTEXT, LAYERS, HEADS, HEAD = 23, 16, 2, 4, 4
HIDDEN = 20


@st.composite
def any_gpts(draw) -> CanonicalGPT:
    width = draw(st.sampled_from((12, HEADS * HEAD)))  # not every model is as wide as its heads together

    def maybe(value):
        return draw(st.sampled_from((None, value)))

    placement, parallel = draw(st.sampled_from(PLACEMENTS)), draw(st.booleans())
    rope, qk_norm, kv_heads = (draw(st.sampled_from(x)) for x in ((None, *ROTATIONS), QK_NORMS, (1, 2, HEADS)))
    experts = draw(st.sampled_from((0, 3)))
    tied, final_norm, embedding_norm, alibi = (draw(st.booleans()) for _ in range(4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, outputs: int, inputs: int, bias: bool | None = None) -> None:
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        if draw(st.booleans()) if bias is None else bias:
            tensors[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.3

    def mlp(name: str) -> None:
        hidden = HIDDEN + (uneven and name == "blocks.1") * 4
        if gated:
            linear(f"{name}.mlp_gate", hidden, width, biases)
        linear(f"{name}.mlp_in", hidden if two else width, width, biases)
        if two:
            linear(f"{name}.mlp_out", width, hidden, biases)

    def scalars(name: str, count: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.5 * torch.randn(count, generator=generator)

    biases, gated = draw(st.booleans()), draw(st.booleans())
    two = gated or experts or draw(st.booleans())
    uneven, valued, value_gated, value_mixed, mixed, smeared = (draw(st.integers(0, 3)) == 0 for _ in range(6))
    backout = draw(st.sampled_from((None, None, 0, 1)))
    linear("token_embedding", VOCAB, width, False)
    if draw(st.booleans()):
        linear("position_embedding", CONTEXT, width, False)
    tensors["head.weight"] = tensors["token_embedding.weight"]
    if not tied:
        linear("head", VOCAB, width)
    norms = {"embedding_norm": width} if embedding_norm else {}
    norms |= {"final_norm": width} if final_norm else {}
    second, shared = draw(st.booleans()), draw(st.booleans())
    output = width != HEADS * HEAD or draw(st.booleans())
    if smeared:
        linear("smear_gate", 1, 3, False)
        scalars("smear_lambda", 1)
    if backout is not None:
        scalars("backout_lambda", 1)
    weighted = draw(st.booleans())
    shifted = weighted and draw(st.booleans())
    for n in range(LAYERS):
        block = f"blocks.{n}"
        for part, rows in (("query", HEADS), ("key", kv_heads), ("value", kv_heads)):
            linear(f"{block}.{part}", rows * HEAD, width, biases)
        if output:
            linear(f"{block}.output", width, HEADS * HEAD, biases)
        if mixed:
            scalars(f"{block}.residual_lambdas", 2)
        if valued and n:
            linear(f"{block}.value_embedding", VOCAB, kv_heads * HEAD, False)
            if value_gated:
                linear(f"{block}.value_gate", kv_heads, 5, False)
            if value_mixed:
                scalars(f"{block}.value_lambdas", 2)
        if experts:
            linear(f"{block}.router", experts, width, False)
            for expert in range(experts):
                mlp(f"{block}.experts.{expert}")
            if shared:
                mlp(f"{block}.shared")
                linear(f"{block}.shared_gate", 1, width, False)
        else:
            mlp(block)
        for name in ("norm_1", "norm_2")[: (parallel or placement != "none") * (1 + second)]:
            norms[f"{block}.{name}"] = width
        if placement == "both" and not parallel:
            norms |= {f"{block}.norm_1_after": width, f"{block}.norm_2_after": width}
        if qk_norm:
            of_keys = HEAD if qk_norm == "head" else kv_heads * HEAD
            norms |= {f"{block}.query_norm": HEAD if qk_norm == "head" else HEADS * HEAD, f"{block}.key_norm": of_keys}
    for name, size in norms.items():
        if weighted:
            tensors[f"{name}.weight"] = 1 + 0.3 * torch.randn(size, generator=generator)
        if shifted:
            tensors[f"{name}.bias"] = 0.3 * torch.randn(size, generator=generator)
    return CanonicalGPT(
        tensors=tensors,
        n_layer=LAYERS,
        n_head=HEADS,
        n_kv_head=kv_heads,
        context_length=CONTEXT,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        attention_scale=draw(st.sampled_from((HEAD**-0.5, width**-0.5, 1.0))),
        attention_cap=maybe(2.0),
        window=maybe(5),
        window_pattern=draw(st.sampled_from((None, "SL", "SS"))),
        norm=draw(st.sampled_from(NORMS)),
        norm_eps=draw(st.sampled_from((1e-5, 1e-6))),
        norm_offset=draw(st.sampled_from((0.0, 1.0))),
        norm_unbiased=draw(st.booleans()),
        norm_eps_outside=draw(st.booleans()),
        final_norm_eps=maybe(1e-2),
        qk_norm_eps=maybe(1e-2),
        norm_placement=placement,
        parallel=parallel,
        final_norm=final_norm,
        embedding_norm=embedding_norm,
        rope=rope,
        rope_theta=draw(st.sampled_from((10_000.0, 500.0))),
        rope_direction=draw(st.sampled_from((1, -1))),
        rope_width=maybe(2),
        rope_span=draw(st.sampled_from(SPANS)),
        alibi=alibi,
        qk_norm=qk_norm,
        qk_norm_type=draw(st.sampled_from(NORMS)),
        qk_norm_after_rope=draw(st.booleans()),
        experts_per_token=2 if experts else 0,
        renormalise_experts=draw(st.booleans()),
        embedding_scale=draw(st.sampled_from((1.0, width**0.5))),
        residual_scale=draw(st.sampled_from((1.0, 0.3, 1.7))),
        residual_scaled=draw(st.sampled_from(SCALED)),
        logit_scale=draw(st.sampled_from((1.0, 0.125))),
        logit_cap=maybe(3.0),
        value_gate_factor=draw(st.sampled_from((1.0, 3.0))),
        backout_layer=backout,
        tied=tied,
    )
