import pytest

from fledge.checkpoints.facts import Fact, Source
from fledge.checkpoints.probe_text import Trial
from fledge.checkpoints.race import Outcome
from fledge.checkpoints.summary import facts_table, refuse_assumptions, trials_table, verdict
from fledge.errors import UserError

KNOWN = [
    Fact.of("n_head", 4, Source.FLAG),
    Fact.of("norm_eps", 1e-5, Source.CONFIG),
    Fact.of("causal", True, Source.TENSORS),
]
OPEN = Fact.of("attention_scale", 0.25, Source.PRACTICE)


def test_verdict_names_each_source_once_and_only_what_changes_logits():
    idle = Fact.of("logit_cap", None, Source.NO_EFFECT)
    assert verdict([*KNOWN, idle]) == (
        "Converted; nothing that Fledge asks about is assumed, and no code was compared. "
        "Settled by checkpoint config: norm_eps; by your word: n_head 4."
    )
    assert verdict([*KNOWN, OPEN]) == "Converted; assumed, not proven: attention_scale 0.25."


def test_assumptions_are_refused_with_what_else_they_could_be():
    refuse_assumptions(KNOWN, {})
    with pytest.raises(UserError) as refused:
        refuse_assumptions([*KNOWN, OPEN], {"attention_scale": ["width", 1.0]})
    assert str(refused.value).startswith(
        "Nothing shows 1 fact that would change the logits, so that they are assumed: attention_scale 0.25 "
        "(or 1/sqrt(width), 1), stated by --attention_scale 0.25."
    )
    with pytest.raises(UserError) as refused:
        refuse_assumptions(
            [OPEN, Fact.of("window", None, Source.PRACTICE), Fact.of("logit_cap", 15.0, Source.GUESS)], {}
        )
    assert (
        "; logit_cap 15, stated by logit_cap: 15 in a --mapping; and nothing that few authors have (window none), "
        "stated by usual: true in a --mapping. What"
    ) in str(refused.value)


def test_table_of_facts_tells_the_users_word_from_the_files():
    lines = facts_table([*KNOWN, OPEN]).splitlines()
    assert [line.split()[0] for line in lines] == ["settled", "settled", "shown", "assumed"]
    assert [line.split(maxsplit=3)[3] for line in lines] == [
        "stated by you", "checkpoint config", "tensors", "usual practice"
    ]  # fmt: skip


def test_table_of_trials_shows_the_closest_first_and_no_ruled_out_pair():
    pair = {"activation": "relu", "rope_theta": 500_000.0}
    table = trials_table(
        [
            Trial({"activation": "relu"}, 2.5, 2.0, 9.0, Outcome.WORSE),
            Trial({"activation": "gelu"}, 2.1, 2.0, 0.0, Outcome.TOO_CLOSE),
            Trial(pair, 2.2, 2.0, 1.0, Outcome.OPEN),
            Trial(pair, 2.3, 2.0, 8.0, Outcome.WORSE),
        ]
    )
    assert table.splitlines() == [
        "  Chosen: 2.0000 nats per token. Other readings:",
        "      2.1000  too close for any text activation gelu",
        "      2.2000  not ruled out          activation relu and rope_theta 500000",
        "      2.5000  worse                  activation relu",
    ]
    assert Trial(pair, 2.2, 2.0, 1.0, Outcome.OPEN).as_dict() == {
        "name": "activation, rope_theta",
        "value": "relu, 500000.0",
        "score": 2.2,
        "chosen": 2.0,
        "errors": 1.0,
        "verdict": "not ruled out",
    }
