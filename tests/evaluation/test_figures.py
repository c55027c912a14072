"""The figures of `metrics.json`."""

import numpy as np

from fledge.evaluation.figures import HEADLINE, by_class
from fledge.evaluation.intervals import Ratio
from fledge.evaluation.report import table_by


def test_prompts_of_one_class_have_no_chance_and_are_still_reported():
    """Where all prompts ask for the same, an answer to another prompt is as good."""
    ratio = {HEADLINE: Ratio(np.ones(2), np.ones(2))}
    models, rows = {"base": ratio, "model": ratio}, [{"ending": "sad"}] * 2
    by = by_class({"ending": ("happy", "sad")}, rows, models, {"chance": {}, "reference": ratio}, {})
    assert by["ending"].keys() == {"sad"}
    assert by["ending"]["sad"]["chance"] == {}
    whole = {part: by["ending"]["sad"][part] for part in ("base", "model", "reference")}
    metrics = {"num_prompts": 2, "chance": {"model": {}}, "baselines": {}, "by": by, **whole}
    assert "| ending = sad | 2" in table_by(metrics)
