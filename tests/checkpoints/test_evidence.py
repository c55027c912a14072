import functools
import json
from dataclasses import replace

import pytest
import torch
from architectures import REFUSED, deviating
from hand_written import (
    CONTEXT_LENGTH,
    HEADS,
    HIDDEN,
    NanoAttention,
    NanoBlock,
    build,
    checkpoint_of,
    own_logits,
    randomise,
    stated,
)
from torch import nn

from fledge.checkpoints import evidence
from fledge.checkpoints.author.call import Author
from fledge.checkpoints.author.reference import load_reference
from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.checkpoints.evidence import settle_by_reference
from fledge.checkpoints.facts import Fact, Source, Status
from fledge.checkpoints.recognition import recognise
from fledge.checkpoints.summary import verdict
from fledge.checkpoints.targets import to_target
from fledge.errors import UserError

pytestmark = pytest.mark.slow  # each test searches the readings of a module


class ByHeadAttention(NanoAttention):
    """Sees a fused projection as (head, query/key/value, row of the head)."""

    def forward(self, x):
        grouped = self.c_attn(x).unflatten(-1, (self.n_head, 3, -1))
        return self.c_proj(self.mix(*grouped.permute(3, 0, 2, 1, 4)).transpose(1, 2).flatten(2))


by_head = functools.partial(deviating, functools.partial(NanoBlock, attention=ByHeadAttention), {})


# The authors' own modules, written out as they would be beside a checkpoint.
SOURCES = {
    "build_nanogpt": "from hand_written import build_nanogpt as Model",
    "lecture_old_scale": "import functools, hand_written\n"
    "Model = functools.partial(hand_written.lecture, scale_by_width=True)",
    "sinusoidal": "from hand_written import SinusoidalGPT as Model",
    "sinusoidal_scaled": "import functools, hand_written\n"
    "Model = functools.partial(hand_written.SinusoidalGPT, scaled=True)",
    "torch_layers": "from hand_written import torch_layers as Model",
    "llama2c_gqa": "from hand_written import llama2c as Model",
}
NANO = """
from hand_written import NanoGPT

class Model(NanoGPT):
    def __init__(self, config):
        super().__init__(**config)

    def forward(self, ids):
        logits = super().forward(ids)
        return logits
"""
ATTRIBUTES = "config.vocab_size, config.block_size, config.n_embd, config.n_head, config.n_layer, config.bias"


@pytest.fixture
def own(tmp_path):
    """The module that `code` defines as Model, loaded beside a checkpoint."""

    def load(code: str, checkpoint, kwargs: str | None = None, name: str = "Model"):
        (tmp_path / "my_model.py").write_text(code, encoding="utf-8")
        return load_reference(f"{tmp_path / 'my_model.py'}:{name}", kwargs, checkpoint)

    return load


def settled(module, config, author) -> tuple[CanonicalGPT, dict[str, Fact]]:
    model, facts = recognise(checkpoint_of(module, config))
    model, error = settle_by_reference(model, facts, author)
    assert error <= 1e-9
    return model, {fact.name: fact for fact in facts}


@pytest.mark.parametrize("variant", SOURCES)
def test_hidden_facts_are_settled_by_the_authors_module(variant, own):
    module, config = build(variant, heads=4)
    model, facts = settled(module, config, own(SOURCES[variant], checkpoint_of(module, config)))
    for name, value in HIDDEN.get(variant, {}).items():
        assert (facts[name].value, facts[name].source) == (value, Source.REFERENCE)
    assert not any(fact.assumed for fact in facts.values())
    ids = torch.arange(CONTEXT_LENGTH)[None]
    assert (canonical_logits(model, ids) - own_logits(module, ids)).abs().max() <= 1e-9


class Shares(nn.Module):
    """A module whose author returns probabilities, or log-probabilities."""

    def __init__(self, module, log):
        super().__init__()
        self.module, self.log = module, log

    def forward(self, ids):
        shares = self.module(ids).softmax(-1)
        return shares.log() if self.log else shares


@pytest.mark.parametrize("log", [True, False])
def test_probabilities_are_compared_as_such(log):
    module, config = build("sinusoidal")
    author = Author(Shares(module, log).double().eval(), "m.py:GPT", module.state_dict())
    model, facts = recognise(checkpoint_of(module, config), told=stated(**HIDDEN.get("sinusoidal", {})))
    _, error = settle_by_reference(model, facts, author, author.avoid, author.tolerance)
    assert error <= 1e-9


def test_table_of_rotations_may_differ_in_its_last_bit():
    model, facts = recognise(checkpoint_of(*build("llama2c")))
    author = replace(model, rope_theta=model.rope_theta * (1 + 2**-22))
    found, error = settle_by_reference(model, facts, functools.partial(canonical_logits, author))
    for name in ("rope", "rope_theta", "norm_eps", "activation", "residual_scale", "attention_scale"):
        assert getattr(found, name) == getattr(model, name)
    assert 1e-9 < error < 1e-5


# What code may multiply by, and no tensor shows: MiniCPM, Granite, modded-nanogpt of June 2024, DeepNorm, μP.
NUMBERS = {
    "minicpm": ("llama2c", {"residual_scale": 1.4 / 2**0.5, "embedding_scale": 12.0, "logit_scale": 1 / 9}),
    "granite": ("llama_half", {"residual_scale": 0.22, "embedding_scale": 12.0, "logit_scale": 0.125}),
    "minicpm with another activation": (
        "llama_half",
        {
            "residual_scale": 0.7,
            "embedding_scale": 12.0,
            "logit_scale": 0.25,
            "activation": "gelu_tanh",
            "norm_eps": 1e-6,
        },
    ),
    "one sublayer": ("student", {"residual_scale": 0.37, "residual_scaled": "attention"}),
    "deepnorm": ("student", {"residual_scale": 4**0.25, "residual_scaled": "stream", "norm_placement": "post"}),
    "mup": ("student", {"attention_scale": 1 / 8, "logit_scale": 3 / 7, "embedding_scale": 5.0}),
    "rotation": ("llama2c", {"rope_theta": 77_000.0, "activation": "gelu_tanh", "attention_cap": 22.0}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_no_tensor_shows_are_fitted_to_the_authors_module(name):
    variant, changes = NUMBERS[name]
    module, config = build(variant)
    model, facts = recognise(checkpoint_of(module, config))
    author = replace(model, **changes)
    found, error = settle_by_reference(model, facts, functools.partial(canonical_logits, author))
    assert error <= 1e-9
    ids = torch.arange(CONTEXT_LENGTH)[None]
    assert (canonical_logits(found, ids) - canonical_logits(author, ids)).abs().max() <= 1e-9
    kept = changes.keys() & {
        "logit_scale",
        "rope_theta",
        "attention_cap",
        "attention_scale",
        "residual_scaled",
        "activation",
    }
    for key in kept:
        assert getattr(found, key) == (pytest.approx(changes[key]) if isinstance(changes[key], float) else changes[key])


@pytest.mark.parametrize("offset", [1, 2])
def test_positions_that_do_not_begin_with_the_first_row_are_found(offset):
    module, _ = build("student")
    model, facts = recognise(checkpoint_of(module, {"n_head": HEADS}))
    author = replace(model, position_offset=offset, context_length=CONTEXT_LENGTH - offset)

    def logits(ids):
        if ids.shape[1] > author.context_length:
            raise UserError("index out of range")
        return canonical_logits(author, ids)

    found, error = settle_by_reference(model, facts, logits)
    assert (found.position_offset, found.context_length) == (offset, CONTEXT_LENGTH - offset)
    assert error <= 1e-9


def test_window_longer_than_the_probes_is_found_in_a_longer_text(monkeypatch):
    module, config = build("student")
    read = recognise(checkpoint_of(module, config))[0]
    monkeypatch.setattr(evidence, "probe_ids", lambda gpt, avoid: [torch.arange(8)[None], torch.arange(6)[None]])

    def settled_by(author):
        model, facts = recognise(checkpoint_of(module, config))
        found, _ = settle_by_reference(model, facts, functools.partial(canonical_logits, author))
        return found.window, {fact.name for fact in facts if fact.assumed}

    assert settled_by(replace(read, window=16)) == (16, set())
    with pytest.raises(UserError, match="reads for 8 tokens, and something else for a text of 20"):
        settled_by(replace(read, window=13))
    monkeypatch.setattr(evidence, "LONG_WORK", 0)
    assert settled_by(replace(read, window=16)) == (None, {"window", "window_pattern"})


class OneLayer(nn.Module):
    """PyTorch's layer as beginners call it: without a mask, or with the batch for the text."""

    def __init__(self, batch_first):
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=batch_first)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.layer(x) @ self.embedding.weight.T


@pytest.mark.parametrize(
    ("batch_first", "doubt"), [(True, "a later token changes an earlier logit"), (False, "no token changes")]
)
def test_forward_that_is_not_causal_is_said_to_be_so(batch_first, doubt):
    module = OneLayer(batch_first).double().eval()
    assert doubt in Author(module, "m.py:GPT", module.state_dict()).doubt


FLIPPED = {
    "activation": "relu2", "attention_scale": 24**-0.5, "norm_eps": 1e-6, "embedding_scale": 24**0.5, "causal": False,
    "norm_placement": "post", "parallel": True, "norm": "layernorm", "rope": "interleaved", "rope_theta": 5e5,
    "rope_direction": -1, "rope_width": 4, "logit_cap": 15.0, "qk_norm": "head",
}  # fmt: skip


@pytest.mark.parametrize("variant", ["student", "llama_half"])
def test_module_catches_each_fact_that_was_flipped(variant):
    module, config = build(variant)
    model, facts = recognise(checkpoint_of(module, {**config, "rms_norm_eps": None}))
    for name in {fact.name for fact in facts if fact.source is not Source.TENSORS} & FLIPPED.keys():
        if name == "activation" and model.gated:
            continue
        author = replace(model, **{name: FLIPPED[name]})
        found, error = settle_by_reference(
            model, copied := [replace(fact) for fact in facts], functools.partial(canonical_logits, author)
        )
        assert (error <= 1e-9, getattr(found, name)) == (True, FLIPPED[name])
        assert all(not fact.assumed for fact in copied)


@pytest.mark.parametrize("seed", range(4))
def test_facts_that_hide_each_other_are_settled_by_the_authors_module(seed):
    module = randomise(by_head()[0], seed)
    model, _ = settled(module, {}, lambda ids: own_logits(module, ids))
    assert model.n_head == HEADS
    module, config = build("sinusoidal_scaled")
    settled(randomise(module, seed), config, lambda ids: own_logits(module, ids))


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({}, "Converted; nothing that Fledge asks about is assumed, and no code was compared."),
        (
            {"activation": Source.FLAG},
            "Converted; nothing that Fledge asks about is assumed, and no code was compared. S",
        ),
        ({"activation": Source.AUTHORS}, "Converted; nothing that Fledge asks about is assumed, and no code was compa"),
        (
            {"activation": Source.PROBE_TEXT},
            "Converted; settled by text, as the weights were most likely trained: activation. ",
        ),
        ({"activation": Source.REFERENCE}, "Proven against the author's module, which settles activation. Settled by "),
        ({"activation": Source.PROBE_TEXT, "norm": Source.GUESS}, "Converted; assumed, not proven: norm 1."),
    ],
)
def test_verdict_names_the_evidence(sources, said):
    given = {"n_head": Source.CONFIG} | sources if sources else {}
    assert verdict([Fact.of(name, 1, source) for name, source in given.items()]).startswith(said)


def test_logits_that_are_not_finite_agree_with_no_reading():
    module, config = build("nanogpt", layers=1)
    model, facts = recognise(checkpoint_of(module, config))
    with pytest.raises(UserError, match="logits differ by inf under the closest reading"):
        settle_by_reference(model, facts, lambda ids: own_logits(module, ids) * torch.nan)


def test_what_is_shown_or_stated_keeps_its_source():
    module, config = build("llama2c")
    model, facts = recognise(checkpoint_of(module, config), told=stated(norm_eps=1e-5))
    settle_by_reference(model, facts, lambda ids: own_logits(module, ids))
    sources = {fact.name: fact.source for fact in facts}
    assert (sources["norm_eps"], sources["tied head"]) == (Source.FLAG, Source.TENSORS)
    assert sources["context_length"] is Source.CONFIG  # no logit shows it
    assert sources["activation"] is Source.REFERENCE


def test_context_that_only_the_authors_code_tells_is_taken():
    module, config = build("llama2c")
    without = checkpoint_of(module, {key: value for key, value in config.items() if value != CONTEXT_LENGTH})
    said = Fact("context_length", 8, Status.SETTLED, Source.REFERENCE, "block_size, m.py")
    with pytest.raises(UserError, match=r"no config says .*context_length: N.*, or pass --reference"):
        recognise(without)
    with pytest.raises(UserError, match=r"neither a config nor the code says .* as --mapping\.$"):
        recognise(without, by_author=replace(said, value=0))
    assert recognise(without, by_author=said)[0].context_length == 8
    assert recognise(checkpoint_of(module, config), by_author=said)[0].context_length == CONTEXT_LENGTH


def test_projections_fused_by_head_are_settled_by_the_authors_module():
    module, config = by_head()
    _, facts = settled(module, config, lambda ids: own_logits(module, ids))
    assert (facts["qkv_by_head"].value, facts["qkv_by_head"].source) == (True, Source.REFERENCE)


def test_unstated_heads_and_rotation_are_settled_by_the_authors_module():
    module, _ = build("story_chat")
    renamed = {name.replace("ln_", "norm_"): tensor for name, tensor in checkpoint_of(module, {}).tensors.items()}
    checkpoint = replace(checkpoint_of(module, {"max_seq_len": 20}), tensors=renamed, left_out={})
    model, facts = recognise(checkpoint)
    assert {fact.name for fact in facts if fact.source is Source.GUESS} == {"n_head", "rope", "positions"}
    model, error = settle_by_reference(model, facts, lambda ids: own_logits(module, ids))
    assert (model.n_head, model.rope) == (HEADS, "interleaved")
    assert error <= 1e-9
    assert not any(fact.assumed for fact in facts)


@pytest.mark.parametrize("config", [{}, {"n_head": HEADS}], ids=["no config", "config"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("non_causal", "trained without a causal mask"), ("post_norm", "no final norm behind post-norm")],
)
def test_model_that_no_target_holds_is_refused_for_what_its_module_shows(name, reason, config):
    module, _ = REFUSED[name]()
    model, _ = settled(module, config, lambda ids: own_logits(module, ids))
    with pytest.raises(UserError, match=reason):
        to_target(model, {})


def test_module_that_computes_something_else_is_refused():
    module, config = build("nanogpt", layers=1)
    module.transformer.h[0].mlp.gelu = nn.Hardtanh()
    model, facts = recognise(checkpoint_of(module, config))
    with pytest.raises(UserError, match=r"Your own module computes something else .* logits differ by "):
        settle_by_reference(model, facts, lambda ids: own_logits(module, ids))


def test_stated_fact_that_the_module_contradicts_is_refused():
    module, config = build("nanogpt", layers=1)
    model, facts = recognise(checkpoint_of(module, config), told=stated(activation="relu"))
    with pytest.raises(UserError, match="computes something else"):
        settle_by_reference(model, facts, lambda ids: own_logits(module, ids))


@pytest.mark.parametrize("told", ["by the checkpoint", "by --reference_kwargs"])
@pytest.mark.parametrize(
    "code",
    [
        pytest.param("from hand_written import NanoGPT as Model", id="keywords"),
        pytest.param(
            "from hand_written import NanoGPT\ndef Model(**config): return NanoGPT(**config)", id="any keywords"
        ),
        pytest.param(NANO, id="one dict"),
        pytest.param(NANO.replace("**config", ATTRIBUTES), id="one object"),
        pytest.param(NANO.replace("return logits", "return logits, None"), id="logits and loss"),
        pytest.param(NANO.replace("return logits", "return logits[:, [-1]], None"), id="last position"),
        pytest.param(NANO.replace("return logits", "return {'loss': None, 'logits': logits}"), id="a dict"),
        pytest.param(
            NANO.replace("return logits", "return type('Output', (), {'logits': logits})"), id="an object with logits"
        ),
        pytest.param(NANO.replace("ids):", "ids, targets=None):"), id="targets"),
    ],
)
def test_author_may_write_his_module_in_any_usual_way(code, told, own):
    module, config = build("nanogpt")
    checkpoint = checkpoint_of(module, config)
    kwargs = None if told == "by the checkpoint" else json.dumps(config)
    author = own(code, checkpoint if kwargs is None else replace(checkpoint, config={}), kwargs)
    settled(module, config, author)
