import math
from dataclasses import replace

import pytest
import torch
from hand_written import build, checkpoint_of, stated

from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.checkpoints.facts import Fact, Source, Status
from fledge.checkpoints.probe_text import settle_by_text
from fledge.checkpoints.questions import Questions, regroup, settle_what_cannot_matter
from fledge.checkpoints.race import Comparison, Outcome
from fledge.checkpoints.recognition import recognise
from fledge.checkpoints.summary import leave_to_code
from fledge.checkpoints.text_loss import pair_loss, text_losses, text_windows, unigram_loss
from fledge.errors import UserError

pytestmark = pytest.mark.slow  # each test compares the losses of many readings
LETTERS = "abcdefghijklmnop"
CONTEXT = 16
SIZES = {"vocab_size": len(LETTERS), "context_length": CONTEXT, "width": 32, "heads": 4, "layers": 2}


def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    return {"input_ids": [LETTERS.index(letter) for letter in text]}


LOUD = {"mlp_in": 1.0, "mlp_gate": 1.0, "mlp_out": 6.0, "query": 1.5, "key": 1.5, "output": 4.0, "head": 3.0}
HEADS_TOLD = {"n_head": 4, "qkv_by_head": False}


def without_caps(facts: list[Fact]) -> list[Fact]:
    """A cap far above every logit hardly differs from none: which of them wins is chance, and takes one more round."""
    return [fact for fact in facts if not fact.name.endswith("_cap")]


def sharpened(variant: str, **told: object) -> tuple[CanonicalGPT, list[Fact]]:
    """A model of random weights as loud as training makes them, so that each part of it is heard in its text."""
    module, config = build(variant, **SIZES)
    gpt, facts = recognise(checkpoint_of(module, config), told=stated(**told))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, tensor in sorted(gpt.tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        loud = LOUD.get(name.split(".")[-2], 1.5) * tensor.shape[-1] ** -0.5
        tensors[name] = noise * loud if tensor.dim() > 1 else tensor + 0.3 * noise
    return replace(gpt, tensors=tensors, tied=False), without_caps(facts)


def written_by(gpt: CanonicalGPT, windows: int) -> str:
    """Text that a model writes by itself, each window of its context going on from the last token of the one before.

    Windows are as long as every reading can take, two tokens less where the first rows of a table may be left out.
    Its parts are written side by side, and the token before a join predicts nothing.
    """
    generator = torch.Generator().manual_seed(2)
    length = CONTEXT - 2 if "position_embedding.weight" in gpt.tensors else CONTEXT
    ids = torch.arange(min(64, windows))[:, None] % gpt.vocab_size
    for _ in range(-(-windows // len(ids))):
        window = ids[:, -1:]
        for _ in range(length):
            shares = canonical_logits(gpt, window, torch.float32)[:, -1].softmax(-1)
            window = torch.cat([window, torch.multinomial(shares, 1, generator=generator)], dim=1)
        ids = torch.cat([ids, window[:, 1:]], dim=1)
    return "".join(LETTERS[i] for i in ids[:, :-1].flatten().tolist())


def settled_by(gpt: CanonicalGPT, facts: list[Fact], author: CanonicalGPT, tmp_path, windows: int = 768):
    (tmp_path / "page.txt").write_text(written_by(author, windows), encoding="utf-8")
    model, loss, trials = settle_by_text(gpt, facts, tokenizer, str(tmp_path / "page.txt"))
    return model, {fact.name: fact for fact in facts}, loss, trials


# Facts of a plain GPT, and of one that rotates its positions, as another author could have them, often two at once.
PLAIN = [
    {"activation": "relu", "attention_scale": 32**-0.5},
    {"activation": "relu", "norm_placement": "post"},
    {"activation": "relu2", "embedding_scale": 32**0.5},
    {"activation": "silu", "parallel": True},
    {"attention_scale": 1.0, "norm_placement": "sublayer"},
]
ROTARY = [
    {},
    {"rope": "interleaved", "norm": "layernorm"},
    {"rope_direction": -1, "activation": "gelu"},
    {"rope_theta": 500_000.0},
    {"qk_norm": "head"},
]


def _alike(value: object, other: object) -> bool:
    """Whether two values of a fact are equal, or exact and tanh GELU, which no text tells apart."""
    return value == other or {value, other} == {"gelu", "gelu_tanh"}


@pytest.mark.parametrize(
    ("variant", "told", "changed"),
    [*(("student", HEADS_TOLD, changed) for changed in PLAIN), *(("llama_half", {}, changed) for changed in ROTARY)],
    ids=lambda value: " ".join(map(str, value.items())) if isinstance(value, dict) else value,
)
def test_text_catches_each_fact_that_was_flipped(variant, told, changed, tmp_path):
    gpt, facts = sharpened(variant, **told)
    true = replace(gpt, **changed)
    check_settled(true, changed, *settled_by(gpt, facts, true, tmp_path))


def check_settled(true: CanonicalGPT, changed: dict, model, by_name, loss, trials) -> None:
    """What was `changed` is found, nothing wrong is settled, and no reading that was tried does better."""
    wrong = {
        name
        for name in by_name
        if name != "qkv_by_head" and not _alike(getattr(model, name, 0), getattr(true, name, 0))
    }
    assert not wrong & changed.keys()
    assert all(by_name[name].assumed for name in wrong)
    assert {name for name in changed if by_name[name].assumed} <= {"activation"}
    assert all(trial.score >= trial.chosen - 1e-3 for trial in trials)


def test_heads_and_fused_rows_that_hide_each_other_are_found(tmp_path):
    gpt, _ = sharpened("student")
    module, _ = build("student", **SIZES)
    facts = without_caps(recognise(checkpoint_of(module, {}))[1])
    true = regroup(replace(gpt, n_head=8, n_kv_head=8, attention_scale=4**-0.5))
    model, by_name, _, _ = settled_by(gpt, facts, true, tmp_path)
    assert (model.n_head, by_name["qkv_by_head"].value) == (8, True)
    ids = torch.arange(CONTEXT)[None]
    assert (canonical_logits(model, ids) - canonical_logits(true, ids)).abs().max() < 1e-9


def test_what_text_cannot_tell_stays_assumed(tmp_path):
    gpt, facts = sharpened("student", **HEADS_TOLD)
    model, by_name, loss, trials = settled_by(gpt, facts, gpt, tmp_path)
    check_settled(gpt, {}, model, by_name, loss, trials)
    assert by_name["activation"].assumed
    assert "gelu_tanh" in by_name["activation"].detail
    said = [trial.verdict for trial in trials if trial.values == {"activation": "gelu_tanh"}]
    assert set(said) == {Outcome.TOO_CLOSE}


def test_little_text_settles_less_and_says_so(tmp_path):
    gpt, facts = sharpened("student", **HEADS_TOLD)
    true = replace(gpt, attention_scale=32**-0.5)
    _, by_name, _, _ = settled_by(gpt, facts, true, tmp_path, windows=8)
    assert by_name["attention_scale"].assumed
    assert "do not rule out attention_scale" in by_name["attention_scale"].detail


def test_what_the_user_stated_is_not_tried(tmp_path):
    module, _ = build("student", **SIZES)
    told = stated(n_head=4, activation="relu", attention_scale=0.3, norm_placement="pre", qkv_by_head=False)
    gpt, facts = recognise(checkpoint_of(module, {}), told=told)
    assert not Questions(gpt, facts).choices.keys() & told.keys()
    assert all(fact.stated and not fact.assumed for fact in facts if fact.name in told)


def test_a_layout_that_the_text_contradicts_gives_way(tmp_path):
    gpt, facts = sharpened("nanogpt")
    assert not any(fact.assumed for fact in facts)
    model, by_name, _, _ = settled_by(gpt, facts, replace(gpt, activation="relu"), tmp_path, windows=2000)
    assert (model.activation, by_name["activation"].source) == ("relu", Source.PROBE_TEXT)


def test_text_of_another_model_is_refused(tmp_path):
    told = {"activation": "gelu", "attention_scale": 8**-0.5, "norm_placement": "pre"}  # few readings are left to try
    gpt, facts = sharpened("student", **HEADS_TOLD, **told)
    text = written_by(gpt, 400)
    (tmp_path / "page.txt").write_text(text.translate(str.maketrans(LETTERS, LETTERS[::-1])))
    with pytest.raises(UserError, match="this text or this tokenizer is not the model's"):
        settle_by_text(gpt, facts, tokenizer, str(tmp_path / "page.txt"))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_probe_text_that_is_no_text_is_refused(content, tmp_path):
    if content:
        (tmp_path / "page.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"--probe_text .*page\.txt cannot be read as text"):
        settle_by_text(*sharpened("student"), tokenizer, str(tmp_path / "page.txt"))


@pytest.mark.parametrize("content", ["", "a"])
def test_probe_text_of_less_than_two_tokens_is_refused(content, tmp_path):
    (tmp_path / "page.txt").write_text(content)
    with pytest.raises(UserError, match="fewer than two tokens"):
        settle_by_text(*sharpened("student"), tokenizer, str(tmp_path / "page.txt"))


@pytest.mark.parametrize(("tokens", "length", "most"), [(5000, 32, 1000), (300, 1024, 5000), (40, 8, 5000), (3, 8, 9)])
def test_windows_share_no_prediction_and_lie_all_over_the_text(tokens, length, most):
    windows, places = text_windows(list(range(tokens)), length, most)
    predicted = windows[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted) <= max(most, tokens)
    assert (windows.diff(dim=1) == 1).all()
    assert windows.min() == 0
    assert windows.max() >= tokens - 1 - windows.shape[1]
    assert windows[places.argsort(), 0].diff().gt(0).all()


def test_losses_are_the_cross_entropy_of_each_window():
    gpt, _ = sharpened("llama_half")
    windows = torch.randint(gpt.vocab_size, (3, 12), generator=torch.Generator().manual_seed(1))
    logits = canonical_logits(gpt, windows[:, :-1])
    expected = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0].mean(1)
    assert torch.allclose(text_losses(gpt, windows).double(), expected, atol=1e-4)


def test_frequencies_of_tokens_and_pairs():
    ids = [0, 1] * 500
    assert unigram_loss(ids) == pytest.approx(math.log(2))
    assert pair_loss(ids) == pytest.approx(0, abs=2e-3)
    assert pair_loss(list(range(100))) == math.inf


@pytest.mark.parametrize(
    ("difference", "errors", "divergence", "worse", "better"),
    [
        (0.05, 9.0, 0.05, True, False),
        (0.05, 3.0, 0.05, False, False),
        (0.05, 9.0, 0.9, False, False),  # far less than the model itself would lose
        (0.05, 9.0, 0.002, False, False),  # far more
        (1e-5, 9.0, 1e-5, False, False),  # too close for any text
        (-0.05, -9.0, 0.05, False, True),
        (-0.05, -1.0, 0.05, False, True),
        (-0.05, -9.0, 0.002, False, False),
        (math.inf, math.inf, math.inf, True, False),
    ],
)
def test_a_reading_is_ruled_out_by_a_sure_difference_as_predicted(difference, errors, divergence, worse, better):
    comparison = Comparison(difference, errors, divergence, matters=True)
    assert (comparison.worse, comparison.better) == (worse, better)


def test_fact_whose_values_all_give_the_same_logits_is_not_open():
    module, _ = build("student", **{**SIZES, "heads": 1})
    gpt, facts = recognise(checkpoint_of(module, {"n_heads": 1}))
    rivals = settle_what_cannot_matter(gpt, facts)
    by_name = {fact.name: fact for fact in facts}
    assert by_name["qkv_by_head"].status is Status.SETTLED
    assert rivals["attention_scale"] == ["none"]  # one head is as wide as the model
    assert by_name["activation"].assumed


def test_text_never_outranks_the_authors_code(tmp_path):
    """Authors change their code after training: code is asked what it computes, text how the weights were trained."""
    gpt, facts = sharpened("student", **HEADS_TOLD, activation="relu")
    for fact in facts:
        if fact.name == "attention_scale":
            fact.status, fact.source = Status.SETTLED, Source.REFERENCE
    trained = replace(gpt, attention_scale=32**-0.5)
    model, facts, _, _ = settled_by(gpt, facts, trained, tmp_path)
    assert model.attention_scale == facts["attention_scale"].value == 8**-0.5
    assert facts["attention_scale"].source is Source.REFERENCE
    assert f"the text favours {32**-0.5}" in facts["attention_scale"].detail


def test_text_settles_nothing_while_code_lies_beside():
    settled = Fact("activation", "relu", Status.SETTLED, Source.PROBE_TEXT, "by 9 standard errors")
    stated = Fact("norm_eps", 1e-5, Status.SETTLED, Source.FLAG)
    leave_to_code([settled, stated], "model.py:GPT")
    assert settled.assumed
    assert "model.py:GPT was not asked" in settled.detail
    assert not stated.assumed
