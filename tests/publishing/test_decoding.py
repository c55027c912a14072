"""What the figures were measured with is what everyone draws with who loads the model, by whatever way."""

import json
import re
import shutil
import sys

import pytest
import torch
import yaml
from conftest import load_module
from transformers import AutoModelForCausalLM, pipeline

from fledge.sampling import Sampling
from fledge.scripts import publish

pytestmark = pytest.mark.slow

KEYS = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams"),
    *("repetition_penalty", "no_repeat_ngram_size", "penalty_alpha", "exponential_decay_length_penalty"),
)
# What transformers does untold beyond the keys of `Sampling`: nothing that changes a draw.
NEUTRAL = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beams": 1, "no_repeat_ngram_size": 0}
UNUSUAL = {"temperature": 0.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}


def effective(model, given: dict) -> dict:
    """What `model.generate(**given)` draws with, as transformers itself resolves it."""
    config, _ = model._prepare_generation_config(None, **given)
    return {key: getattr(config, key, None) for key in KEYS}


def measured(sampling: dict) -> dict:
    keys = ("temperature", "top_k", "top_p", "repetition_penalty")
    return dict.fromkeys(KEYS) | NEUTRAL | {"do_sample": True} | {key: sampling[key] for key in keys}


@pytest.fixture(scope="module")
def unusual(tiny, tmp_path_factory):
    """The same model, published with an evaluation that drew otherwise."""
    work = tmp_path_factory.mktemp("unusual")
    evaluation = shutil.copytree(tiny.evaluation, work / "evaluation")
    metrics = tiny.metrics | {"sampling": tiny.metrics["sampling"] | UNUSUAL}
    (evaluation / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    given = ["--model", tiny.model, "--evaluation", evaluation, "--repo_id", "a/b", "--space_repo_id", "a/c"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["publish.py", *map(str, given), "--dry_run", "--output_dir", str(work / "out")])
        publish.main()
    return work / "out", metrics["sampling"]


@pytest.fixture(params=["as always", "measured otherwise"])
def published(request, tiny):
    """The repositories, and what the figures on their card were measured with."""
    if request.param == "as always":
        return tiny.repository, tiny.metrics["sampling"]
    return request.getfixturevalue("unusual")


def test_the_pipeline_and_the_snippets_draw_as_was_measured(published):
    folder, sampling = published
    writer = pipeline("text-generation", str(folder / "model"))
    for given in ({}, {"max_new_tokens": 9}):  # alone, and as on the card
        assert effective(writer.model, writer._prepare_generate_kwargs(given)) == measured(sampling)
    assert effective(AutoModelForCausalLM.from_pretrained(folder / "model"), {"max_new_tokens": 9}) == measured(
        sampling
    )


def test_the_widget_and_the_command_on_the_card_draw_as_was_measured(published):
    folder, sampling = published
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    widget = yaml.safe_load(re.split("^---$", card, flags=re.MULTILINE)[1])["inference"]["parameters"]
    assert widget.items() <= measured(sampling).items()
    (command,) = (line for line in card.splitlines() if line.startswith("fledge generate"))
    told = {key: value for key, value in UNUSUAL.items() if f"--{key} {value} " in command}
    assert {**vars(Sampling()), **told} == sampling | {"max_new_tokens": 300}


def test_a_base_draws_as_the_model_made_of_it(tiny):
    base = pipeline("text-generation", str(tiny.base))
    assert effective(base.model, base._prepare_generate_kwargs({})) == measured(tiny.metrics["sampling"])


def test_the_space_draws_as_was_measured_for_model_and_base(published, tiny, monkeypatch):
    pytest.importorskip("gradio", reason="the Space needs gradio: pip install 'fledge-gpt[demo]'")
    folder, sampling = published
    app = load_module(folder / "space" / "app.py")
    made, given = [], {}

    class Recorded(app.Writer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(app, "Writer", Recorded)
    app.build(str(folder / "model"), str(tiny.base))
    assert len(made) == 2
    for writer in made:
        monkeypatch.setattr(writer.model, "generate", lambda **told: given.update(told) or torch.tensor([[5, 6]]))
        list(writer.answer([5], app.SETTINGS["temperature"], 8))
        assert effective(writer.model, {key: given[key] for key in KEYS if key in given}) == measured(sampling)
