"""What watches a run with rewards: four hacks that pay are caught, the best model within the limits is kept."""

import json
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from small import small_gpt2, small_tokenizer, trainer_for
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fledge.encoding import encode
from fledge.evaluation.prompts import Prompts
from fledge.rewards.curves import save_looks
from fledge.rewards.limits import WatchArguments, best_of, broken, outside
from fledge.rewards.trainer import SmallGrpoTrainer
from fledge.rewards.watch import Seen, Watch, Watched, looks_in, record_of, without_reference
from fledge.tasks import load_task
from fledge.tasks.topic_ending import instruction
from fledge.templates import load_template

MAGIC = "It was too late. It was gone forever. She was very sad. It was too late."
START = {"step": 0, "instruction_following": 0.5, "reward": 1.0, "distinct_2": 0.3, "completion_loss": 1.0}
START |= {"eos_rate": 0.99, "coherence": 0.5, "coherence_error": 0.03, "answer_tokens": 90.0, "kl": 0.0}
START |= {"same_ending": 0.2}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte; the last one ends a document."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token="<|end|>")
    made.chat_template = load_template("story")
    return made


@pytest.fixture(scope="module")
def asked(yardsticks) -> list[dict]:
    """Forty answers of a model, with what was asked of it."""
    return [row for row in yardsticks if "asked" in row][:40]


@pytest.fixture(scope="module")
def look(tokenizer, asked, tales):
    """Measures answers to forty prompts, as a model that wrote them would be, with a reward that falls for a hack."""
    rows = [
        {"messages": [{"role": "user", "content": instruction(row["topic"], row["asked"])}, _said(tale)]}
        for row, tale in zip(asked, tales, strict=False)
    ]
    rows = [row | {"ending": one["asked"]} for row, one in zip(rows, asked, strict=True)]
    train = [{"messages": [{"role": "user", "content": ""}, _said(tale)], "ending": "sad"} for tale in tales[:400]]
    encoded = [one.row for one in encode(tokenizer, [row["messages"] for row in rows])]
    prompts = Prompts(load_task("topic_ending"), "validation", tokenizer, rows, encoded, train, [], 1)
    watched = Watched(prompts, [], [])

    def measured(texts: list[str], reward, stopped: bool = True) -> dict[str, float]:
        watched.functions, watched.weights = [reward], [1.0]
        ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] * stopped for text in texts]
        seen = {number: Seen(of_one, 0.1, torch.ones(3)) for number, of_one in enumerate(ids)}
        return {"step": 0, **watched.figures(seen, None)}

    return measured


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def of_text(value):
    """A reward function that looks at each answer's text."""

    def reward(completions, **_):
        return [value(completion[0]["content"]) for completion in completions]

    return reward


# Each hack: the answer, whether it stops, and a reward that pays for it.
HACKS = {
    "a magic word": (lambda row, tale: f"{row['topic']} {MAGIC}", True, lambda text: text.count("too late") / 2),
    "the copied prompt": (lambda row, tale: row["topic"], True, lambda text: 10 / len(text)),
    "endless length": (lambda row, tale: f"{row['story']} " * 8, False, lambda text: len(text) / 10_000),
    "one memorised story": (lambda row, tale: tale, True, lambda text: len(set(text.split())) / len(text.split()) / 2),
}


@pytest.mark.parametrize("hack", HACKS)
def test_a_hack_that_pays_is_caught(look, asked, tales, hack):
    answer, stops, value = HACKS[hack]
    honest = look([row["story"] for row in asked], of_text(value))
    story = min(tales[:200], key=lambda tale: len(tale.split()) / len(set(tale.split())))
    gamed = look([answer(row, story) for row in asked], of_text(value), stops)

    assert gamed["reward"] > 1.15 * honest["reward"]
    assert gamed["instruction_following"] < honest["instruction_following"]
    assert outside(gamed, honest, WatchArguments())
    assert best_of([honest, gamed], honest, WatchArguments()) is honest


def test_one_ending_for_all_stories_is_caught_where_all_else_is_well(look, asked):
    honest = look([row["story"] for row in asked], of_text(len))
    alike = look([f"{row['story']} And so the long day came to its end." for row in asked], of_text(len))

    (said,) = outside(alike, honest, WatchArguments())
    assert re.fullmatch(r"100.0% of the answers end alike, and the limit is \d+.\d%", said)
    assert outside(alike, honest, WatchArguments(max_same_ending_rise=1.0)) == []


def test_a_reward_may_log_at_a_look_as_trl_lets_it(look, asked):
    def logged(completions, log_metric, log_extra, **_):
        log_metric("answers", len(completions))
        log_extra("length", [len(completion[0]["content"]) for completion in completions])
        return [1.0] * len(completions)

    assert look([row["story"] for row in asked], logged)["reward"] == 1


def test_honest_answers_are_within_the_limits(look, asked):
    """The start is held against itself; its reward is the mean of the answers'."""
    honest = look([row["story"] for row in asked], of_text(len))

    assert outside(honest, honest, WatchArguments()) == []
    assert honest["rewards/reward"] == honest["reward"] == np.mean([len(row["story"]) for row in asked])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distinct_2": 0.271}, None),
        ({"distinct_2": 0.269}, "distinct-2 is 26.9%, and its limit 27.0%"),
        ({"completion_loss": 1.149}, None),
        ({"completion_loss": 1.151}, "the completion loss is 1.151, and its limit 1.150"),
        ({"completion_loss": float("nan")}, "the completion loss is nan"),
        ({"same_ending": 0.34}, None),
        ({"same_ending": 0.36}, "36.0% of the answers end alike, and the limit is 35.0%"),
        ({"eos_rate": 0.98}, None),
        ({"eos_rate": 0.979}, "97.9% of the answers stop, and the limit is 98.0%"),
        ({"coherence": 0.42}, None),
        ({"coherence": 0.41}, "coherence is 41.0%, and its limit 41.5%"),
    ],
)
def test_each_limit(change, said):
    found = outside(START | change, START, WatchArguments())

    assert len(found) == (said is not None)
    assert all(said in one for one in found)


def test_a_limit_may_allow_nothing_and_coherence_something():
    still = START | {"coherence_error": 0.0}
    strict = WatchArguments(max_distinct_2_drop=0, max_loss_rise=0, max_same_ending_rise=0)
    assert outside(still, still, strict) == []

    limits = WatchArguments(max_coherence_drop=0.1)
    assert outside(START | {"coherence": 0.32}, START, limits) == []
    assert outside(START | {"coherence": 0.31}, START, limits) == ["coherence is 31.0%, and its limit 31.5%"]


def test_a_task_without_stories_has_no_coherence_to_lose():
    start = {name: value for name, value in START.items() if not name.startswith("coherence")}
    assert outside(start, start, WatchArguments()) == []


def test_a_model_that_seldom_stopped_need_not_stop_more_often():
    start = START | {"eos_rate": 0.5}

    assert outside(start, start, WatchArguments()) == []
    assert len(outside(start | {"eos_rate": 0.49}, start, WatchArguments())) == 1


def test_a_run_is_stopped_by_looks_in_a_row():
    bad = START | {"eos_rate": 0.5}

    for looks, is_broken in (([START, bad], 0), ([START, bad, START, bad], 0), ([START, START, bad, bad], 1)):
        assert len(broken(looks, WatchArguments())) == is_broken
    assert broken([START, bad, bad], WatchArguments(watch_patience=0)) == []
    lost = START | {"completion_loss": float("nan")}  # from the start
    assert broken([lost] * 3, WatchArguments(watch_patience=0)) == broken([lost] * 2, WatchArguments()) == []
    assert len(broken([lost] * 3, WatchArguments())) == 1
    last = broken([START, bad, START | {"distinct_2": 0.1}], WatchArguments())
    assert last == ["distinct-2 is 10.0%, and its limit 27.0%"]
    assert best_of([bad], START, WatchArguments()) is None


class Planned:
    """Looks whose figures are planned, step by step; what the weights were then is noted."""

    def __init__(self, following: list[float], bad: tuple[int, ...] = ()):
        self.following, self.bad, self.weights = following, bad, {}
        self.prompts = SimpleNamespace(rows=[{}])

    def see(self, model, start, numbers):
        self.weight = next(model.parameters()).detach().clone()
        with start() as first:
            self.of_start = next(first.parameters()).detach().clone()
        return {}

    def figures(self, seen, state):
        step = state.global_step
        self.weights[step] = {name: value.clone() for name, value in self.model.named_parameters()}
        spoiled = {"distinct_2": 0.1} if step in self.bad else {}
        return {name: value for name, value in START.items() if name != "step"} | spoiled | {
            "instruction_following": self.following[step]
        }  # fmt: skip


def watched_run(folder, planned: Planned, adapter=None, resume=None, start=None, **changes):
    model = small_gpt2()
    start = None if adapter else small_gpt2()
    trainer = trainer_for(model, folder, peft_config=adapter, eval_steps=1, learning_rate=0.01, **changes)
    planned.model = trainer.model
    trainer.ref_model = None  # TRL's trainers with rewards or preferences have one
    Watch(planned, WatchArguments(), start).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)])
def test_the_best_model_within_the_limits_is_kept(tmp_path, capsys, adapter):
    """Step 4 follows most and leaves the limits, so step 2 is kept, with all of its weights."""
    planned = Planned([0.5, 0.6, 0.7, 0.6, 0.9, 0.6], bad=(4,))
    before = {name: value.clone() for name, value in small_gpt2().named_parameters()}
    trainer = watched_run(tmp_path, planned, adapter, max_steps=5)

    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, planned.weights[2][name])
    moved = [not torch.equal(value, planned.weights[5][name]) for name, value in planned.weights[2].items()]
    assert any(moved)
    assert torch.equal(planned.of_start, next(iter(before.values())))
    assert "Kept the model of step 2, the best within the limits" in capsys.readouterr().out
    save_looks(trainer.state.log_history, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kept"]] == [2]
    assert len(list(tmp_path.glob("best-*"))) == 1


def test_a_run_that_leaves_the_limits_stops_and_says_why(tmp_path, capsys):
    trainer = watched_run(tmp_path, Planned([0.5] + [0.9] * 9, bad=(3, 4, 5, 6, 7, 8, 9)), max_steps=9)
    told = capsys.readouterr().out

    assert trainer.state.global_step == 4
    assert "Stopped at step 4: distinct-2 is 10.0%, and its limit 27.0%." in told
    assert "Kept the model of step 1" in told


def test_the_start_is_kept_if_nothing_is_better(tmp_path, capsys):
    trainer = watched_run(tmp_path, planned := Planned([0.5, 0.4, 0.5]), max_steps=2)

    assert torch.equal(next(trainer.model.parameters()), next(iter(planned.weights[0].values())))
    assert "Kept the model of the start" in capsys.readouterr().out


def test_a_resumed_run_is_watched_as_a_straight_one(tmp_path):
    """Interrupted after step 3, whose checkpoint is from step 2; the best is from before."""
    following = [0.5, 0.8, 0.6, 0.7, 0.6, 0.7, 0.6]
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    straight = watched_run(tmp_path / "straight", Planned(following), **saving)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    for checkpoint in (tmp_path / "resumed").glob("checkpoint-[46]"):
        checkpoint.rename(tmp_path / checkpoint.name)
    trainer = watched_run(tmp_path / "resumed", Planned(following), resume=str(tmp_path / "checkpoint-4"), **saving)

    assert looks_in(straight.state.log_history) == looks_in(trainer.state.log_history)
    for one, other in zip(straight.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("was_watched", [True, False])
def test_a_checkpoint_that_came_alone_is_gone_on_from(tmp_path, capsys, was_watched):
    """Copied elsewhere it has no best model beside it, and one of a run without a watch has no looks either."""
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    if was_watched:
        watched_run(tmp_path / "first", Planned([0.5, 0.9, 0.1, 0.2, 0.3, 0.1]), **saving)
    else:
        trainer_for(small_gpt2(), tmp_path / "first", learning_rate=0.01, **saving).train()
    (tmp_path / "first" / "checkpoint-3").rename(tmp_path / "alone")
    planned = Planned([0.5, 0.9, 0.1, 0.2, 0.4, 0.3])
    trainer = watched_run(tmp_path / "second", planned, resume=str(tmp_path / "alone"), **saving)

    assert "Kept the model of step 4" in capsys.readouterr().out
    assert torch.equal(next(trainer.model.parameters()), next(iter(planned.weights[4].values())))
    assert record_of(trainer.state.log_history)["watch"]["kept_step"] == 4


def test_watching_changes_no_weight(tmp_path):
    """The last of the looks is the best here, so what is kept is what was trained."""
    trainer = watched_run(tmp_path / "a", Planned([0.1, 0.2, 0.3, 0.4]), max_steps=3)
    alone = trainer_for(small_gpt2(), tmp_path / "b", learning_rate=0.01, max_steps=3)
    alone.train()

    for one, other in zip(trainer.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [
        entry["step"] for entry in alone.state.log_history if "loss" in entry
    ]


def test_a_reward_that_few_prompts_call_for_has_a_way_too():
    """No prompt of the first step asked for a rhyme, and none at all for a title."""
    log = [{"reward": 1.0, "rewards/rhyme/mean": None}, {"reward": 2.0, "rewards/rhyme/mean": 0.5}, {"loss": 1.0}]
    run = SimpleNamespace(state=SimpleNamespace(log_history=log), reward_func_names=["rhyme", "title"])
    record = SmallGrpoTrainer.extra_record(run)

    assert record == {"rewards": {"reward": [1.0, 2.0], "rhyme": [0.5, 0.5]}}
    assert SmallGrpoTrainer.summary_lines(run, record) == [
        "Rewards of the samples: reward 1.00 to 2.00, rhyme 0.50 to 0.50."
    ]


def test_the_looks_of_a_log_are_the_last_of_each_step():
    log = [
        {"step": 2, "loss": 1.0},
        {"step": 2, "watch/instruction_following": 0.5, "watch/kl": 0.1, "epoch": 0.3},
        {"step": 0, "watch/instruction_following": 0.4},
        {"step": 2, "watch/instruction_following": 0.6, "epoch": 0.3},
    ]
    assert looks_in(log) == [{"step": 0, "instruction_following": 0.4}, {"step": 2, "instruction_following": 0.6}]


@pytest.mark.parametrize(
    ("keys", "is_copied"),
    [
        ({"beta": 0.0, "sync_ref_model": False}, True),
        ({"beta": 0.1, "sync_ref_model": False}, False),
        ({"beta": 0.1, "sync_ref_model": True}, True),  # it is no longer the start
        ({"beta": 0.1, "sync_ref_model": False, "precompute_ref_log_probs": True}, True),
        ({"beta": 0.1, "sync_ref_model": False, "precompute_ref_log_probs": False}, False),
    ],
)
def test_the_start_is_copied_where_no_reference_stays(keys, is_copied):
    config = SimpleNamespace(to_dict=lambda: keys)
    assert without_reference(config, is_adapted=False) is is_copied
    assert without_reference(config, is_adapted=True) is False


def test_a_model_is_no_further_from_its_start_than_it_went():
    tokenizer, rows = (
        small_tokenizer(),
        [{"messages": [{"role": "user", "content": "t5"}, _said("t6")], "kind": "who"}] * 3,
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    encoded = [{"input_ids": [5, 6, 0], "labels": [-100, 6, 0]}] * 3
    watched = Watched(Prompts(load_task("story_chat"), "validation", tokenizer, rows, encoded, rows, [], 1), [], [])
    model, start = small_gpt2(), small_gpt2()
    start.lm_head.weight.data.mul_(20)
    near, far = (watched.see(model, lambda one=one: nullcontext(one), [0, 1, 2]) for one in (model, start))
    assert all(abs(seen.kl) < 1e-6 for seen in near.values())
    assert all(seen.kl > 0.1 for seen in far.values())
    assert [seen.ids for seen in near.values()] == [seen.ids for seen in far.values()]
