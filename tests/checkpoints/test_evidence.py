import functools
import json
import math
import random
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from architectures import REFUSED, deviating
from hand_written import (
    CONTEXT_LENGTH,
    HEADS,
    HIDDEN,
    WIDTH,
    Block,
    NanoAttention,
    NanoBlock,
    RotaryAttention,
    build,
    checkpoint_of,
    gpt,
    llama_mlp,
    norms,
    own_logits,
    randomise,
    rotate_half_split,
    stated,
)
from torch import nn

from fledge.checkpoints.canonical import CanonicalGPT, reference_logits
from fledge.checkpoints.evidence import (
    alternatives,
    load_reference,
    settle,
    settle_by_reference,
    settle_by_text,
    text_losses,
    text_windows,
)
from fledge.checkpoints.layouts import Fact, recognise, require_settled
from fledge.checkpoints.targets import refuse_unconvertible, to_target
from fledge.cli import UserError

# A language of eight letters, of which the next follows from the last and the third last, but for one in thirty.
LETTERS = "abcdefgh"
SIZES = {"vocab_size": len(LETTERS), "context_length": 32, "width": 32, "heads": 2, "layers": 2}


def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    return {"input_ids": [LETTERS.index(letter) for letter in text]}


def text(length: int, seed: int) -> str:
    rule, chance = random.Random(7), random.Random(seed)
    follows = [[rule.randrange(8) for _ in LETTERS] for _ in LETTERS]
    ids = [0, 1, 2]
    while len(ids) < length:
        ids.append(chance.randrange(8) if chance.random() < 1 / 30 else follows[ids[-1]][ids[-3]])
    return "".join(LETTERS[i] for i in ids)


def train(module: nn.Module, steps: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15, generator=generator)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    ids = torch.tensor(tokenizer(text(20_000, seed=0), False)["input_ids"])
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    length = SIZES["context_length"]
    for _ in range(steps):
        starts = torch.randint(len(ids) - length, (16, 1), generator=generator)
        windows = ids[starts + torch.arange(length + 1)]
        loss = F.cross_entropy(module(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module.eval()


class ByHeadAttention(NanoAttention):
    """Sees a fused projection as (head, query/key/value, row of the head)."""

    def forward(self, x):
        grouped = self.c_attn(x).unflatten(-1, (self.n_head, 3, -1))
        return self.c_proj(self.mix(*grouped.permute(3, 0, 2, 1, 4)).transpose(1, 2).flatten(2))


by_head = functools.partial(deviating, functools.partial(NanoBlock, attention=ByHeadAttention), {})


def with_relu() -> nn.Module:
    module, _ = build("nanogpt", **SIZES)
    for block in module.transformer.h:
        block.mlp.gelu = nn.ReLU()
    return module


def rotary(vocab_size, context_length, width, heads, layers) -> nn.Module:
    """LLaMA's names, over a LayerNorm without a bias and halves of a head rotated together."""
    norm = functools.partial(nn.LayerNorm, bias=False)

    def block():
        attention = RotaryAttention("wq wk wv wo", width, heads, heads, rotate_half_split)
        names = "attention_norm attention ffn_norm feed_forward"
        mlp = llama_mlp(width, 2 * width)
        return Block(names, attention=attention, feed_forward=mlp, **norms("attention_norm ffn_norm", width, norm))

    blocks = [block() for _ in range(layers)]
    return gpt("tok_embeddings layers norm output", vocab_size, None, width, blocks, norm=norm, tied=True)


@functools.cache
def trained(name: str) -> nn.Module:
    """A model that has learned the language, so that it tells right facts from wrong ones."""
    if name == "relu":
        module = train(with_relu(), 250)
        with torch.no_grad():  # which changes nothing behind a ReLU, and much behind a GELU
            for block in module.transformer.h:
                block.mlp.c_fc.weight *= 0.25
                block.mlp.c_fc.bias *= 0.25
                block.mlp.c_proj.weight *= 4
    elif name == "rotary":
        module = train(rotary(**SIZES), 200)
        with torch.no_grad():  # which changes nothing before a LayerNorm, and much before an RMSNorm
            module.tok_embeddings.weight += 0.5
    else:
        module = train((by_head if name == "by_head" else REFUSED[name])(**SIZES)[0], 150)
    return module


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("probe") / "page.txt"
    file.write_text(text(1500, seed=1), encoding="utf-8")
    return str(file)


def read(module: nn.Module, config: dict) -> tuple[CanonicalGPT, dict[str, Fact], list[Fact]]:
    model, facts = recognise(checkpoint_of(module, config))
    return model, {fact.name: fact for fact in facts}, facts


def test_heads_and_activation_are_found_in_text(page):
    module = trained("relu")
    model, by_name, facts = read(module, {})
    assert (model.n_head, by_name["n_head"].source) == (4, "nobody")
    assert (model.activation, by_name["activation"].source) == ("gelu", "layout default")
    model, loss, trials = settle_by_text(model, facts, tokenizer, page)
    assert (model.n_head, model.activation, model.causal, model.norm_placement) == (2, "relu", True, "pre")
    assert by_name["n_head"].source.startswith("--probe_text")
    assert by_name["activation"] == Fact("activation", "relu", "--probe_text")
    assert by_name["attention_scale"].value == model.attention_scale == 16**-0.5
    refuse_unconvertible(model)
    require_settled(facts)
    windows = text_windows(tokenizer(text(1500, seed=1), False)["input_ids"], 32, 128, 32)
    own = F.cross_entropy(own_logits(module, windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    assert loss == pytest.approx(own.item(), abs=1e-4)
    assert {trial.name for trial in trials} >= {"n_head", "activation", "attention_scale", "norm_placement", "causal"}
    assert all(trial.score > loss for trial in trials if trial.name in ("n_head", "activation", "norm_placement"))


def test_projections_fused_by_head_are_found_in_text(page):
    module = trained("by_head")
    model, by_name, facts = read(module, {"n_head": 2})
    model, _, _ = settle_by_text(model, facts, tokenizer, page)
    assert by_name["qkv_by_head"] == Fact("qkv_by_head", True, "--probe_text")
    ids = torch.arange(32)[None] % 8
    assert (reference_logits(model, ids) - own_logits(module, ids)).abs().max() <= 1e-9


def test_rotation_and_norm_are_found_in_text(page):
    model, by_name, facts = read(trained("rotary"), {"n_heads": 2, "max_seq_len": 32})
    assert (model.norm, model.rope) == ("rmsnorm", "interleaved")
    model, _, _ = settle_by_text(model, facts, tokenizer, page)
    assert by_name["rope"] == Fact("rope", "half", "--probe_text")
    assert by_name["norm"] == Fact("norm", "layernorm", "--probe_text")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("non_causal", "trained without a causal mask"), ("post_norm", "no final norm behind post-norm")],
)
def test_model_that_no_target_holds_is_refused_for_what_text_shows(name, reason, page):
    model, _, facts = read(trained(name), {})
    refuse_unconvertible(model)
    model, _, _ = settle_by_text(model, facts, tokenizer, page)
    with pytest.raises(UserError, match=reason):
        to_target(model, {})


def test_what_was_stated_is_not_tried(page):
    told = stated(n_head=4, activation="gelu", attention_scale=0.3, norm_placement="pre", qkv_by_head=False)
    told |= stated(embedding_scale=1.0, norm="layernorm")
    model, facts = recognise(checkpoint_of(trained("relu"), {}), told=told)
    assert [changes for changes, _ in alternatives(model, facts)] == [{"causal": False}]
    with suppress(UserError):
        settle_by_text(model, facts, tokenizer, page)
    assert {fact.name: fact for fact in facts if fact.name in told} == told | {
        "norm": Fact("norm", "layernorm", "tensors")
    }


def test_facts_that_hide_each_other_are_found_in_text(page):
    module = trained("by_head")
    model, by_name, facts = read(module, {})
    assert (model.n_head, by_name["n_head"].source) == (4, "nobody")
    model, _, _ = settle_by_text(model, facts, tokenizer, page)
    ids = torch.arange(32)[None] % 8
    assert (reference_logits(model, ids) - own_logits(module, ids)).abs().max() <= 1e-9


def test_model_that_has_not_learned_the_text_is_refused(page):
    model, _, facts = read(build("nanogpt", **SIZES)[0], {"n_head": 2})
    with pytest.raises(UserError, match=r"guessing among 8 tokens gives 2\.08: this is not its text"):
        settle_by_text(model, facts, tokenizer, page)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_probe_text_that_is_no_text_is_refused(content, tmp_path):
    model, _, facts = read(build("nanogpt", **SIZES)[0], {"n_head": 2})
    if content:
        (tmp_path / "page.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"--probe_text .*page\.txt cannot be read as text"):
        settle_by_text(model, facts, tokenizer, str(tmp_path / "page.txt"))


@pytest.mark.parametrize("content", ["", "a"])
def test_probe_text_of_less_than_two_tokens_is_refused(content, tmp_path):
    (tmp_path / "page.txt").write_text(content)
    model, _, facts = read(build("nanogpt", **SIZES)[0], {"n_head": 2})
    with pytest.raises(UserError, match="fewer than two tokens"):
        settle_by_text(model, facts, tokenizer, str(tmp_path / "page.txt"))


@pytest.mark.parametrize(
    ("tokens", "context_length", "count", "length", "shape"),
    [
        (5000, 32, 16, 128, (16, 33)),
        (5000, 1024, 16, 128, (16, 129)),
        (300, 1024, 16, 128, (2, 129)),
        (100, 1024, 16, 128, (1, 100)),
        (3, 1024, 16, 128, (1, 3)),
    ],
)
def test_windows_lie_all_over_the_text(tokens, context_length, count, length, shape):
    windows = text_windows(list(range(tokens)), context_length, count, length)
    assert tuple(windows.shape) == shape
    assert windows[0, 0] == 0
    assert windows[-1, -1] == tokens - 1
    assert (windows.diff(dim=1) == 1).all()


def test_losses_are_the_cross_entropy_of_each_window():
    module, config = build("llama_half")
    model, _ = recognise(checkpoint_of(module, config))
    windows = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))
    logits = own_logits(module, windows[:, :-1])
    expected = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)
    assert torch.allclose(text_losses(model, windows).double(), expected, atol=1e-5)


def test_alternatives_are_every_other_value_of_an_open_fact():
    model, facts = recognise(checkpoint_of(build("nanogpt")[0], {}))
    tried = alternatives(model, facts)
    assert [changes for changes, _ in tried] == [
        {"n_head": 1},
        {"n_head": 1, "qkv_by_head": True},
        {"n_head": 2},
        {"n_head": 2, "qkv_by_head": True},
        {"n_head": 3},
        {"n_head": 3, "qkv_by_head": True},
        {"qkv_by_head": True},
        {"n_head": 6},
        {"n_head": 6, "qkv_by_head": True},
        *({"attention_scale": value} for value in (WIDTH**-0.5, 1.0)),
        *({"activation": value} for value in ("gelu_tanh", "relu", "relu2", "silu")),
        {"embedding_scale": WIDTH**0.5},
        {"norm_placement": "post"},
        {"causal": False},
    ]
    for changes, other in tried:
        changed = {name: value for name, value in vars(other).items() if value is not vars(model)[name]}
        if changed.get("attention_scale") == model.attention_scale:
            del changed["attention_scale"]
        if "n_head" in changes:
            assert changed.pop("n_kv_head") == changes["n_head"]
            assert changed.pop("attention_scale") == (WIDTH / changes["n_head"]) ** -0.5
        by_head = changes.pop("qkv_by_head", False)
        assert ("tensors" in changed) is by_head
        assert {name: value for name, value in changed.items() if name != "tensors"} == changes


def test_alternatives_of_a_rotary_model_keep_queries_on_shared_keys():
    module, config = build("llama2c_gqa", heads=4)
    del config["n_heads"]
    model, facts = recognise(checkpoint_of(module, config))
    tried = [changes | {"n_kv_head": other.n_kv_head} for changes, other in alternatives(model, facts)]
    assert [changes for changes in tried if "n_head" in changes or "rope" in changes] == [
        {"n_head": 2, "n_kv_head": 1},
        {"n_head": 2, "rope": "half", "n_kv_head": 1},
        {"rope": "half", "n_kv_head": 2},
        {"n_head": 6, "n_kv_head": 3},
        {"n_head": 6, "rope": "half", "n_kv_head": 3},
    ]


def scored(scores: dict[tuple[str, object], list[float]], now: list[float]):
    """Settles nanoGPT by the scores of one changed fact; what is not listed is far worse."""
    model, facts = recognise(checkpoint_of(build("nanogpt")[0], {}))

    def score(other: CanonicalGPT) -> torch.Tensor:
        changed = [(name, value) for name, value in vars(other).items() if value is not vars(model)[name]]
        listed = [values for fact, values in scores.items() if fact in changed and other.tensors is model.tensors]
        return torch.tensor(listed[0] if listed else [99.0] * len(now) if changed else now)

    model, _ = settle(model, facts, score, "--probe_text")
    return model, {fact.name: fact for fact in facts}


def test_other_value_must_be_clearly_better():
    model, facts = scored({("activation", "relu"): [1.0, 1.0, 1.0, 1.9]}, now=[1.1, 1.1, 1.1, 2.1])
    assert (model.activation, facts["activation"]) == ("relu", Fact("activation", "relu", "--probe_text"))
    model, facts = scored({("activation", "relu"): [1.0, 1.0, 1.0, 2.2]}, now=[1.1, 1.1, 1.1, 2.1])
    assert (model.activation, facts["activation"]) == ("gelu", Fact("activation", "gelu", "layout default"))


def test_best_value_is_taken_of_what_nobody_stated_even_if_it_is_not_clearly_better():
    model, facts = scored({("n_head", 3): [1.0, 1.0, 1.0, 2.2]}, now=[1.1, 1.1, 1.1, 2.1])
    assert model.n_head == 3
    assert facts["n_head"] == Fact("n_head", 3, "--probe_text, where others do as well")
    model, facts = scored({("n_head", 3): [1.0, 1.0, 1.2, 2.3]}, now=[1.1, 1.1, 1.1, 2.1])
    assert model.n_head == 4
    assert facts["n_head"] == Fact("n_head", 4, "--probe_text, where others do as well")


def test_value_adopted_beside_a_wrong_one_gives_way_to_the_assumed_one_that_does_as_well():
    model, facts = recognise(checkpoint_of(build("nanogpt")[0], {}))

    def score(other: CanonicalGPT) -> torch.Tensor:
        if other.tensors is not model.tensors or other.attention_scale != (WIDTH // other.n_head) ** -0.5:
            return torch.tensor([99.0, 99.0])
        if other.embedding_scale != 1 or other.norm_placement == "post" or not other.causal:
            return torch.tensor([99.0, 99.0])
        if other.n_head == 3:
            return torch.tensor({"relu": [1.0, 1.2], "gelu": [1.2, 1.1]}.get(other.activation, [9.0, 9.0]))
        return torch.tensor({"relu": [5.0, 5.0]}.get(other.activation, [7.0, 7.0]))

    model, _ = settle(model, facts, score, "--probe_text")
    by_name = {fact.name: fact for fact in facts}
    assert (model.n_head, model.activation) == (3, "gelu")
    assert by_name["n_head"] == Fact("n_head", 3, "--probe_text")
    assert by_name["activation"] == Fact("activation", "gelu", "layout default")


def test_values_that_are_not_finite_lose():
    model, facts = scored({("activation", "relu"): [math.nan, 0.0]}, now=[1.0, 1.1])
    assert facts["activation"] == Fact("activation", "gelu", "--probe_text")
    model, _ = scored({("activation", "relu"): [5.0, 5.0]}, now=[math.nan, math.inf])
    assert model.activation == "relu"


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
        assert facts[name] == Fact(name, value, "--reference")
    assert not any(fact.open for fact in facts.values())
    ids = torch.arange(CONTEXT_LENGTH)[None]
    assert (reference_logits(model, ids) - own_logits(module, ids)).abs().max() <= 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_facts_that_hide_each_other_are_settled_by_the_authors_module(seed):
    module = randomise(by_head()[0], seed)
    model, _ = settled(module, {}, lambda ids: own_logits(module, ids))
    assert model.n_head == HEADS
    module, config = build("sinusoidal_scaled")
    settled(randomise(module, seed), config, lambda ids: own_logits(module, ids))


def test_projections_fused_by_head_are_settled_by_the_authors_module():
    module, config = by_head()
    _, facts = settled(module, config, lambda ids: own_logits(module, ids))
    assert facts["qkv_by_head"] == Fact("qkv_by_head", True, "--reference")


def test_heads_and_rotation_that_nobody_stated_are_settled_by_the_authors_module():
    module, _ = build("story_chat")
    renamed = {name.replace("ln_", "norm_"): tensor for name, tensor in checkpoint_of(module, {}).tensors.items()}
    checkpoint = replace(checkpoint_of(module, {"max_seq_len": 20}), tensors=renamed, left_out={})
    model, facts = recognise(checkpoint)
    assert {fact.name for fact in facts if fact.source == "nobody"} == {"n_head", "rope"}
    model, error = settle_by_reference(model, facts, lambda ids: own_logits(module, ids))
    assert (model.n_head, model.rope) == (HEADS, "interleaved")
    assert error <= 1e-9
    require_settled(facts)


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
    module, config = build("nanogpt")
    for block in module.transformer.h:
        block.mlp.gelu = nn.Hardtanh()
    model, facts = recognise(checkpoint_of(module, config))
    with pytest.raises(UserError, match=r"Your own module computes something else .* logits differ by "):
        settle_by_reference(model, facts, lambda ids: own_logits(module, ids))


def test_stated_fact_that_the_module_contradicts_is_refused():
    module, config = build("nanogpt")
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


@pytest.mark.parametrize(
    ("code", "kwargs", "reason"),
    [
        ("Other = 1", None, r"my_model\.py defines no Model"),
        ("def broken(:", None, r"cannot be built from .* \(SyntaxError: .*--reference_kwargs"),
        ("import no_such_module", None, r"cannot be built from .* \(ModuleNotFoundError: .*--reference_kwargs"),
        ("Model = 3", None, r"cannot be built from .* \(TypeError: .*--reference_kwargs"),
        ("def Model(): return 3", None, r"cannot be built from .* \(TypeError: .*--reference_kwargs"),
        ("def Model(**config): return config", None, r"my_model\.py:Model is a dict and no torch\.nn\.Module"),
        (NANO.replace("**config", "config['d_model']"), None, r"cannot be built from .* \(KeyError: 'd_model'\)"),
        (NANO.replace("**config", "config.d_model"), None, r"cannot be built from .* \(AttributeError: d_model\)"),
        (NANO, '{"n_embd": 24}', r"cannot be built from \{'n_embd': 24\} \(TypeError: .*--reference_kwargs"),
        (NANO, "{n_embd: 24}", "--reference_kwargs is no JSON object"),
        (NANO, "[1, 2]", "--reference_kwargs is no JSON object"),
        (NANO, "24", "--reference_kwargs is no JSON object"),
        (
            NANO.replace("super().forward(ids)", "1 / 0"),
            None,
            "fails in its forward: ZeroDivisionError: division by zero",
        ),
        (
            NANO.replace("return logits", "return logits[..., 1:]"),
            None,
            r"gives logits \(1, 20, 60\) where \(1, 20, 61\)",
        ),
        (NANO.replace("return logits", "return logits.mean(), logits"), None, "must return logits"),
        (NANO.replace("return logits", "return None"), None, "must return logits"),
        (NANO.replace("return logits", "return [logits]"), None, "must return logits"),
    ],
)
def test_module_that_does_not_work_is_refused_with_the_reason(code, kwargs, reason, own):
    checkpoint = checkpoint_of(*build("nanogpt"))
    with pytest.raises(UserError, match=reason) as refused:
        settle_by_reference(*recognise(checkpoint), own(code, checkpoint, kwargs))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"n_embd": 48}, r"has other shapes: .*size mismatch"),
        ({"n_layer": 3}, r"and the checkpoint differ in transformer\.h\.2\.ln_1\.weight"),
        ({"n_layer": 1}, r"and the checkpoint differ in transformer\.h\.1\.ln_1\.weight"),
        ({"bias": False}, r"and the checkpoint differ in transformer\.h\.0\.ln_1\.bias"),
    ],
)
def test_weights_that_do_not_fit_the_module_are_refused(changed, reason, own):
    module, config = build("nanogpt")
    with pytest.raises(UserError, match=reason) as refused:
        own(NANO, checkpoint_of(module, config), json.dumps(config | changed))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("spec", ["", "my_model", "my_model.py", "no_such.py:GPT", ":GPT", "/:GPT"])
def test_reference_that_names_no_file_is_refused(spec):
    with pytest.raises(UserError, match=r"must be FILE\.py:Class, and there is no file"):
        load_reference(spec, None, checkpoint_of(*build("nanogpt")))
