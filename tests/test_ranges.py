"""Every number that a key takes: what is out of range is one sentence, before anything is opened."""

import dataclasses
import importlib
import math
import sys
import typing

import pytest
from trl import ModelConfig

from fledge import sampling
from fledge.cli import parse
from fledge.errors import UserError
from fledge.pretraining.pretrainer import PretrainConfig
from fledge.ranges import Range, check_ranges
from fledge.rewards.configuration import SmallGrpoConfig
from fledge.rewards.limits import WatchArguments
from fledge.training import settings
from fledge.training.trainer import SmallModelConfig

# Negative numbers mean something there: the last blocks, no limit of steps, one process.
MAY_BE_NEGATIVE = {"freeze_layers"}
SCRIPTS = {
    "generate": "GenerateArguments",
    "evaluate_model": "EvaluateArguments",
    "prepare_dataset": "PrepareArguments",
    "train_tokenizer": "TokenizerArguments",
    "trim_vocabulary": "TrimArguments",
    "pretrain": "PretrainArguments",
}
MODULES = {name: importlib.import_module(f"fledge.scripts.{name}") for name in SCRIPTS}
TABLES = [
    *((getattr(module, SCRIPTS[name]), module.RANGES) for name, module in MODULES.items()),
    (sampling.Sampling, sampling.RANGES),
    (SmallModelConfig, settings.RANGES),
    (SmallGrpoConfig, settings.RANGES),
    (WatchArguments, settings.RANGES),
    (PretrainConfig, settings.RANGES),
    (ModelConfig, settings.RANGES),
    (importlib.import_module("fledge.scripts.train_sft").RunArguments, settings.RANGES),
]


def numbers_of(kind: type) -> list[str]:
    hints = typing.get_type_hints(kind)
    return [
        entry.name
        for entry in dataclasses.fields(kind)
        if {int, float} & set(typing.get_args(hints[entry.name]) or [hints[entry.name]])
    ]


@pytest.mark.parametrize(("kind", "ranges"), TABLES, ids=[kind.__name__ for kind, _ in TABLES])
def test_every_numeric_key_has_a_range_and_its_default_lies_in_it(kind, ranges):
    assert set(numbers_of(kind)) - ranges.keys() <= MAY_BE_NEGATIVE
    for entry in dataclasses.fields(kind):
        if entry.name in ranges and isinstance(entry.default, (int, float)):
            assert entry.default in ranges[entry.name], entry.name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -2, 2**70])
@pytest.mark.parametrize(("kind", "ranges"), TABLES, ids=[kind.__name__ for kind, _ in TABLES])
def test_what_is_no_number_or_negative_is_refused_for_every_key(kind, ranges, value):
    for name in set(numbers_of(kind)) - MAY_BE_NEGATIVE:
        given = dataclasses.make_dataclass("Given", [(name, float)])(value)
        with pytest.raises(UserError, match=f"--{name} .* (is out of range|is no number)"):
            check_ranges(given, ranges)


OUT_OF_RANGE = [
    *[("learning_rate", value) for value in ("nan", -1, 0, "inf")],
    *[("max_length", value) for value in (-1, 0, 1)],
    *[("num_train_epochs", value) for value in (0, -1, "nan")],
    *[("per_device_train_batch_size", 0), ("per_device_eval_batch_size", 0), ("gradient_accumulation_steps", 0)],
    *[("warmup_steps", "nan"), ("weight_decay", "nan"), ("max_steps", 0), ("seed", -1), ("logging_steps", 0)],
]


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (kind, *given)
        for kind in (SmallModelConfig, PretrainConfig)
        for given in OUT_OF_RANGE
        if given[0] in {field.name for field in dataclasses.fields(kind)}
    ],
)
def test_a_training_key_out_of_range_is_refused_as_it_is_parsed(kind, key, value, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: m\n{key}: {'.' + str(value) if isinstance(value, str) else value}\n")
    for given in (["--output_dir", "m", f"--{key}", str(value)], ["--config", str(recipe)]):
        with pytest.raises(UserError, match=f"--{key} .* is (out of range|no number)"):
            parse(given, kind)


def test_a_range_says_what_it_takes():
    assert str(Range(above=0, at_most=1)) == "above 0 and at most 1"
    assert str(Range(at_least=1, besides=-1)) == "at least 1, or -1"
    assert -1 in Range(at_least=1, besides=-1)
    assert math.nan not in Range(at_least=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--load_in_4bit", "true"], "--load_in_4bit True would have no effect"),
        (["--load_in_8bit", "true"], "--load_in_8bit True would have no effect"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 would have no effect"),
        (["--eos_token", "x"], "--eos_token x would have no effect"),
        (["--trust_remote_code", "true"], "--trust_remote_code True would have no effect"),
        (["--dropout", "nan"], "--dropout nan is out of range"),
        (["--lora_r", "0"], "--lora_r 0 is out of range"),
        (["--report_to", "trackio"], r"pip install 'fledge-gpt\[track\]'"),
        (["--report_to", "comet_ml"], "pip install comet_ml"),
        (["--report_to", "nothing"], "--report_to nothing is unknown; transformers knows azure_ml"),
        (
            ["--load_best_model_at_end", "true", "--eval_strategy", "no"],
            "--load_best_model_at_end compares evaluations",
        ),
        (["--early_stopping_patience", "2", "--eval_strategy", "no"], "--early_stopping_patience compares evaluations"),
        (["--push_to_hub", "true"], "publish.py sends the model"),
        (["--deepspeed", '{"zero_optimization": {"stage": 2}}'], "(?i)deepspeed"),
    ],
)
def test_a_key_that_would_be_ignored_or_fail_late_is_refused(arguments, said, tmp_path, monkeypatch):
    train_sft = importlib.import_module("fledge.scripts.train_sft")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    given = ["--model_name_or_path", tmp_path / "base", "--dataset", "none", "--output_dir", tmp_path / "m", *arguments]
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, given)])
    with pytest.raises(UserError, match=said) as refused:
        train_sft.main()
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "m").exists()
