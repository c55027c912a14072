import json
import re

import pytest

from fledge.evaluation.report import (
    answers_id,
    beside,
    cautions,
    constraint_rows,
    curves,
    fold_ratings,
    headroom,
    histogram,
    page,
    read_ratings,
    report,
    show,
    table,
)
from fledge.evaluation.scoring import judges_apart
from fledge.tasks import load_task

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7*7 }} & <b>"
)


def metric(value: float, n: int = 3) -> dict:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}


def level(value: float, without: str = "ending") -> dict:
    return metric(value) | {"without": without}


def scores(met: float) -> dict:
    return {"instruction_following": met, "topic_words": 0.5, "eos_rate": 1.0}


def made(text: str, met: float) -> dict:
    return {"text": text, "tokens": 40 + len(text), "stopped": True, "scores": scores(met)}


def of_class(first_sentence: float) -> dict:
    following = {"instruction_following": metric(0.6)}
    parts = dict.fromkeys(("base", "model", "chance", "reference"), following)
    return {"prompts": 2, **parts, "baselines": {"first_sentence": {"instruction_following": metric(first_sentence)}}}


@pytest.fixture
def samples() -> list[dict]:
    asked = ["Write about a kite.", "Write about a boat.", HOSTILE]
    return [
        {
            "prompt": i,
            "sample": 0,
            "instruction": ask,
            "messages": [{"role": "user", "content": ask}],
            "reference": f"held out {i}",
            "ending": ("happy", "sad")[i % 2],
            "base": made(f"base wrote {i} {HOSTILE}", float(i == 2)),
            "model": made(f"model wrote {i}", float(i != 1)),
        }
        for i, ask in enumerate(asked)
    ]


@pytest.fixture
def metrics() -> dict:
    names = {"instruction_following": 0.4, "topic_words": 0.5, "completion_loss": 1.25}
    return {
        "task": "topic_ending",
        "split": "test",
        "only": [],
        "num_prompts": 3,
        "num_samples": 1,
        "sampling": {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 300, "seed": 0},
        "constraints": {"instruction_following": 1.0, "topic_words": 0.5, "eos_rate": 1.0, "rhyme": 1.0},
        "judge": {
            "says": ["The classifier of endings is right on 99.3% of 434 unseen stories."],
            "calibration": [{"said_sad": 0.037, "was_sad": 0.05, "n": 434}],
            "errors": [HOSTILE],
        },
        "meaning": {name: f"what {name} means" for name in (*names, "first_sentence")},
        "base": {name: metric(value) for name, value in names.items()},
        "model": {name: metric(value + 0.2) for name, value in names.items()},
        "difference": {"instruction_following": metric(0.2), "completion_loss": metric(-0.3)},
        "chance": {
            "base": {"instruction_following": level(0.1), "topic_words": level(0.45, "topic")},
            "model": {"instruction_following": level(0.49), "topic_words": level(0.65, "topic")},
        },
        "judges_apart": {},
        "no_chance": {"completion_loss": "it is measured on the held-out answers"},
        "reference": {"instruction_following": metric(0.99), "topic_words": metric(0.7)},
        "baselines": {"first_sentence": {"instruction_following": metric(0.3)}},
        "by": {"ending": {"happy": of_class(0.65), "sad": of_class(0.2)}},
        "loss_by_position": {
            who: [{"first": 1, "last": 1, "nats": top, "n": 3}, {"first": 2, "last": 2, "nats": 1.0, "n": 3}]
            for who, top in (("base", 4.0), ("model", 0.5))
        },
    }


def test_shares_are_percentages_and_the_rest_is_not():
    found = {"value": 0.8731, "low": 0.831, "high": 0.912, "n": 9}
    assert show("ending_match", found) == "87.3% (83.1 to 91.2)"
    assert show("perplexity", found) == "0.873 (0.831 to 0.912)"
    assert show("judge_score", {"value": 61.25, "low": 50, "high": 70, "n": 9}) == "61.2 (50.0 to 70.0)"
    large = {"value": 12705.41, "low": 3208.8, "high": 45035.7, "n": 6}
    assert show("perplexity", large) == "12,705 (3,209 to 45,036)"
    huge = {"value": 2.69e43, "low": 1e6, "high": 2.69e43, "n": 6}
    assert show("perplexity", huge) == "2.7e+43 (1.0e+06 to 2.7e+43)"
    assert show("ending_match", None) == ""
    assert show("perplexity", {"value": 3.5, "low": 3.5, "high": 3.5, "n": 1}) == "3.500 (no interval)"


def test_a_metric_that_one_model_has_alone_leaves_the_other_cell_empty(metrics):
    del metrics["base"]["topic_words"]
    cells = [cell.strip() for cell in table(metrics).split("\n")[3].split("|")[1:-1]]
    assert cells == ["topic words", "", "70.0% (60.0 to 80.0)", "", "65.0%", "70.0%"]
    assert len({len(line) for line in table(metrics).split("\n")}) == 1


def test_the_report_says_what_everything_means_and_who_judged(metrics):
    text = report(metrics)
    assert table(metrics) in text
    assert "right on 99.3% of 434 unseen stories" in text
    assert "- topic words: what topic_words means" in text
    assert re.search(r"ending = happy +\| 2 ", text)


def test_a_figure_stands_beside_chance_and_reference(metrics):
    assert beside(metrics) == "60% (chance 49%, reference 99%)"
    assert "(instruction following without the ending, topic words without the topic)" in report(metrics)
    assert "base 40% (chance 10%, reference 99%), instruct 60% (chance 49%, reference 99%)." in report(metrics)
    del metrics["chance"]["model"]["instruction_following"]
    metrics["no_chance"]["instruction_following"] = "it does not depend on the instruction"
    assert beside(metrics) == "60% (no chance level: it does not depend on the instruction, reference 99%)"


def test_a_figure_at_chance_or_at_a_baseline_says_so(metrics):
    said = cautions(metrics)
    assert [sentence.partition(" (")[0] for sentence in said] == [
        "No better than chance: base's topic words",
        "No better than chance: instruct's topic words",
        "Instruct follows no better than the baseline first sentence, which needs no model: ending = happy 65.0%.",
    ]
    for who in ("base", "model"):
        metrics["chance"][who] = {name: metric(0.05) for name in metrics["chance"][who]}
    metrics["by"] = {}
    assert cautions(metrics) == []


def test_headroom_is_a_sentence(metrics):
    assert headroom(metrics) == []
    names = {"pass@1": 0.5, "pass@2": 0.7, "all_right": 0.3, "all_wrong": 0.1}
    metrics["headroom"] = {"model": {name: metric(value) for name, value in names.items()}}
    (said,) = headroom(metrics)
    assert "50.0% within 1, 70.0% within 2 of 1 answers" in said
    assert "30.0% have only right answers and 10.0% only wrong ones" in said
    assert said.endswith("on the other 60.0%.")


@pytest.mark.parametrize(("second", "apart"), [(0.55, None), (0.54, 0.06), (0.66, -0.06)])
def test_twin_judges_part_beyond_five_points(second, apart):
    found = judges_apart(
        {"ending_match": metric(0.6), "ending_match_second": metric(second)}, load_task("topic_ending")
    )
    assert (found and found["difference"]) == (apart and pytest.approx(apart))
    assert judges_apart({}, load_task("story_chat")) is None


def test_judges_that_part_are_said(metrics):
    metrics["judges_apart"] = {"model": {"metrics": ["instruction_following", "topic_words"], "difference": -0.1}}
    said = cautions(metrics)[2]
    assert said.startswith("The judges part by 10.0 points on instruct's answers (instruction following 60.0%, topic ")
    assert "one of them is being gamed" in said


def test_answers_without_a_score_are_said(metrics):
    metrics["llm_judge"] = {
        "model": "a-judge",
        "samples": 3,
        "scores": {"asked": 18, "unanswered": 6, "unparseable": 2, "answers": 6, "answers_without_score": 2},
        "pairs": {"pairs": 3, "pairs_without_verdict": 1, "pairs_decided_by_order": 1},
        "preference": metric(0.75),
        "last_failure": "TimeoutError: timed out",
    }
    text = report(metrics)
    assert "2 of 6 answers have no score (2 of 18 replies held none, 6 requests failed; the last: Timeout" in text
    assert "1 were decided by the order and count as undecided, 1 have no verdict: instruct preferred 75.0%" in text


def test_nothing_an_answer_holds_becomes_part_of_the_page(metrics, samples):
    text = page(metrics, samples, ["ending"], {"base": f"runs/{HOSTILE}", "model": "runs/model"})
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text
    assert "{{ 7*7 }}" in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    least = {"instruction_following": 1.0, **metrics["constraints"]}
    assert "same_ending" in data.pop("lower_is_better")
    assert data == {"answers": answers_id(samples), "columns": ["ending"], "least": least, "samples": samples}


def test_the_page_shows_how_sure_the_judge_may_be(metrics, samples):
    text = page(metrics, samples, ["ending"], {"base": "base", "model": "model"})
    assert "<td>4%</td><td>5%</td><td>434</td>" in text


def test_the_page_stands_alone(metrics, samples):
    metrics["judge"] = {"accuracy": 0.9, "n": 3}
    text = page(metrics, samples, ["ending"], {"base": "base", "model": "model"})
    assert "default-src 'none'" in text
    code = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.findall(r"""[\s"'](?:src|href)=|url\(|@import""", code)


@pytest.mark.parametrize("longest", [1, 7, 24, 25, 300, 5000])
def test_every_answer_is_in_the_histogram(longest):
    lengths = {"base": [1, longest], "model": [longest] * 3}
    bins = histogram(lengths)
    assert {who: sum(counts) for who, counts in bins["counts"].items()} == {"base": 2, "model": 3}
    assert bins["counts"]["model"][longest // bins["width"]] == bins["highest"]
    assert bins["count"] <= 50


@pytest.mark.parametrize("top", [0.0, 0.004, 1.0, 4.01, 11.7])
def test_points_of_a_curve_lie_on_the_paper(top):
    points = [{"first": 1, "last": 1, "nats": top, "n": 1}, {"first": 2, "last": 2, "nats": top / 2, "n": 1}]
    drawn = curves({"base": points, "model": points})
    assert all(0 <= point[axis] <= 1 for line in drawn["lines"].values() for point in line for axis in "xy")
    assert [tick["y"] for tick in drawn["ticks"]][-1] == pytest.approx(1)


def test_a_constraint_is_counted_where_a_prompt_states_it(samples, metrics):
    rows = {row.pop("name"): row for row in constraint_rows(metrics["constraints"], samples)}
    assert rows["instruction_following"] == {"least": 1.0, "n": 3, "base": 1, "model": 2, "gained": 1, "lost": 0}
    assert rows["topic_words"] == {"least": 0.5, "n": 3, "base": 3, "model": 3, "gained": 0, "lost": 0}
    assert list(rows) == ["instruction_following", "topic_words", "eos_rate"]  # no prompt asks for a rhyme
    assert "<td>topic words <span" in page(metrics, samples, [], {"base": "b", "model": "m"})


def test_in_a_browser(browser, metrics, samples, tmp_path):
    file = tmp_path / "report.html"
    names = {"base": f"runs/{HOSTILE}", "model": "runs/model"}
    file.write_text(page(metrics, samples, ["ending"], names), encoding="utf-8")
    errors, fetched = [], []
    for width, scheme in ((1200, "light"), (360, "dark")):
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(file.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert "owned" not in tab.title().removeprefix("Base against instruct: ")
        tops = {round(tab.locator(f".figure .{who}").bounding_box()["y"]) for who in ("base", "model")}
        assert len(tops) == 1
    assert tab.locator("article").count() == 3
    assert tab.locator("article img, article b").count() == 0

    tab.fill("#search", "BOAT")
    assert tab.locator("article").count() == 1
    tab.fill("#search", "")
    tab.select_option("#which", "gained")
    assert "kite" in tab.locator("article").inner_text()
    tab.select_option("#which", "")
    tab.select_option("#class", label="ending: sad")
    assert "boat" in tab.locator("article").inner_text()

    tab.select_option("#class", label="all classes")
    tab.locator("article a").nth(1).click()
    assert tab.locator("article").count() == 1
    address = tab.url
    assert address.endswith("report.html#answer-2")
    tab.goto("about:blank")
    tab.goto(address)
    assert "boat" in tab.locator("article").inner_text()
    assert "1 of 3" in tab.locator("#count").inner_text()
    tab.click("#all")
    assert tab.locator("article").count() == 3
    assert not tab.locator("#all").is_visible()

    tab.click("#rate")
    assert not tab.locator("#answers").is_visible()
    said = []
    for key in ("1", "2", "0"):
        left, right = (tab.locator("#pair .answer").nth(side).inner_text() for side in (0, 1))
        assert "instruct" not in left + right
        said.append({"1": left, "2": right, "0": "tie"}[key])
        tab.keyboard.press(key)
    with tab.expect_download() as download:
        tab.click("#save")
    download.value.save_as(tmp_path / "ratings.json")
    human = fold_ratings([read_ratings(str(tmp_path / "ratings.json"))], samples)
    counts = {who: sum(f"{who} wrote" in text for text in said) for who in ("base", "model")}
    assert {who: human[who] for who in ("base", "model", "tie")} == {**counts, "tie": 1}
    assert not errors
    assert all(url.startswith(("file:", "blob:")) for url in fetched)
