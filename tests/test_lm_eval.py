"""lm-evaluation-harness runs on what Fledge writes, and scores a prepared dataset as evaluate_model.py does."""

import json
import sys

import pytest
from conftest import ROOT

from fledge.scripts import evaluate_model

TOKENS = 40


@pytest.fixture(scope="module")
def greedy(tiny, tmp_path_factory) -> dict:
    """The figures of evaluate_model.py."""
    folder = tmp_path_factory.mktemp("greedy") / "evaluation"
    keys = {"--model": tiny.model, "--base": tiny.base, "--dataset": tiny.data, "--output_dir": folder}
    keys |= {"--temperature": 0, "--max_new_tokens": TOKENS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate_model.py", *(str(part) for pair in keys.items() for part in pair)])
        evaluate_model.main()
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("who", ["base", "model"])
def test_the_harness_gives_the_same_scores(who, tiny, greedy):
    harness = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[harness]'")
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager(
        include_path=str(ROOT / "recipes" / "lm_eval"), include_defaults=False, metadata={"dataset": str(tiny.data)}
    )
    found = harness.simple_evaluate(
        model="hf",
        model_args={"pretrained": str({"base": tiny.base, "model": tiny.model}[who]), "dtype": "float32"},
        tasks=["fledge"],
        task_manager=manager,
        gen_kwargs=f"max_gen_toks={TOKENS}",
        device="cpu",
        batch_size=1,  # in larger batches the harness lets models attend to padding that is end-of-text
    )["results"]["fledge"]
    scores = {key.removesuffix(",none"): value for key, value in found.items() if key.endswith(",none")}
    scores = {name: value for name, value in scores.items() if not name.endswith("_stderr")}
    assert {"instruction_following", "ending_match", "topic", "coherence"} <= scores.keys()
    assert scores == pytest.approx({name: greedy[who][name]["value"] for name in scores})
