"""evaluate_model.py as people run it: resumed, judged, rated, and given bad input."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_script

from fledge.encoding import open_prepared
from fledge.errors import UserError
from fledge.evaluation import measuring, wording
from fledge.evaluation.measuring import Answering
from fledge.evaluation.report import answers_id
from fledge.generation.answers import answer_all
from fledge.journal import Journal
from fledge.models import load_model
from fledge.resizing import add_rows
from fledge.sampling import Sampling
from fledge.scripts import evaluate_model

pytestmark = pytest.mark.slow


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def evaluate(tiny, monkeypatch, capsys):
    """Runs the script in this process on the tiny system, few prompts and short answers."""

    def run(output_dir: Path, *arguments: object) -> str:
        keys = {"--model": tiny.model, "--base": tiny.base, "--dataset": tiny.data, "--output_dir": output_dir}
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        keys |= {"--num_prompts": 4, "--max_new_tokens": 12} | given
        keys = {name: value for name, value in keys.items() if value is not None}
        monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *(str(part) for pair in keys.items() for part in pair)])
        evaluate_model.main()
        return capsys.readouterr().out

    return run


def test_an_interrupted_evaluation_goes_on_where_it_was(tiny, evaluate, tmp_path, monkeypatch):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    evaluate(whole, "--num_samples", 2)
    asked = []

    def stop_after_five(journal, entries):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(entries)
        add(journal, entries)

    add = Journal.add
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            evaluate(torn, "--num_samples", 2)
    assert [path.name for path in torn.iterdir()] == ["unfinished"]
    assert len(read_lines(torn / "unfinished" / "answers.jsonl")) == 1 + 5
    with pytest.raises(UserError, match=r"unfinished evaluation; --resume goes on, --overwrite begins anew"):
        evaluate(torn, "--num_samples", 2)
    with pytest.raises(UserError, match="another --temperature"):
        evaluate(torn, "--num_samples", 2, "--resume", True, "--temperature", 0.5)

    kept = (torn / "unfinished" / "answers.jsonl").read_text(encoding="utf-8")
    evaluate(torn, "--num_samples", 2, "--resume", True)
    assert (torn / "answers.jsonl").read_text(encoding="utf-8").startswith(kept)
    for name in ("samples.jsonl", "metrics.json", "report.md"):
        assert (torn / name).read_text(encoding="utf-8") == (whole / name).read_text(encoding="utf-8")
    assert not (torn / "unfinished").exists()


def test_files_of_others_stop_an_evaluation(evaluate, tmp_path):
    dvc = tmp_path / "dvc"
    dvc.mkdir()
    for name in ("metrics.json", "thesis.tex"):
        (dvc / name).write_text("mine")
    for how in ("--resume", "--overwrite"):
        with pytest.raises(UserError, match=r"holds .* and no mark of evaluate_model.py, so Fledge did not write it"):
            evaluate(dvc, how, True)
    assert {file.name: file.read_text() for file in dvc.iterdir()} == dict.fromkeys(
        ["metrics.json", "thesis.tex"], "mine"
    )


def test_a_page_that_fails_and_a_full_disk_lose_no_answer(evaluate, tmp_path, monkeypatch):
    resource, out = pytest.importorskip("resource"), tmp_path / "out"
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, earlier[1]))
    try:
        with pytest.raises(UserError, match=r"answers.jsonl cannot be written: .*; make room and go on with --resume"):
            evaluate(out, "--num_samples", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    kept = (out / "unfinished" / "answers.jsonl").read_bytes().rpartition(b"\n")[0]
    assert kept.count(b"\n") > 0
    monkeypatch.setattr("fledge.evaluation.report.page", lambda *arguments: 1 // 0)
    evaluate(out, "--num_samples", 3, "--resume", True)
    assert (out / "answers.jsonl").read_bytes().startswith(kept)
    assert (out / "metrics.json").exists()
    assert not (out / "report.html").exists()


def test_answers_alone_are_those_of_a_whole_evaluation(tiny, evaluate, tmp_path):
    asked = ("--split", "train", "--num_samples", 2)
    evaluate(tmp_path / "whole", *asked)
    said = evaluate(tmp_path / "alone", *asked, "--base", None, "--answers_only", True)
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {".fledge.json", "samples.jsonl", "answers.jsonl"}
    assert re.search(r"8 answers to 4 prompts. Mean rewards: ending [\d.]+, topic [\d.]+, stopped [\d.]+, usual", said)
    assert re.search(r"Next: python prepare_dataset.py .*--source answers", said)
    alone, whole = (read_lines(tmp_path / name / "samples.jsonl") for name in ("alone", "whole"))
    assert {(line["task"], line["split"]) for line in alone + whole} == {("topic_ending", "train")}
    for line, other in zip(alone, whole, strict=True):
        assert line["model"]["text"] == other["model"]["text"]
        assert line["model"]["rewards"].keys() == {"ending", "topic", "stopped", "usual", "varied"}
        assert "base" not in line
    with pytest.raises(UserError, match="asks the model alone and writes no report; leave out --base"):
        evaluate(tmp_path / "out", "--answers_only", True)


def test_such_prompts_alone_are_asked(evaluate, tmp_path):
    said = evaluate(tmp_path / "out", "--only", "ending=sad")
    assert "4 held-out prompts with ending=sad of the test split" in said
    assert {sample["ending"] for sample in read_lines(tmp_path / "out" / "samples.jsonl")} == {"sad"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["only"] == ["ending=sad"]


def test_several_answers_to_a_prompt(evaluate, tmp_path):
    evaluate(tmp_path / "out", "--num_samples", 3)
    samples = read_lines(tmp_path / "out" / "samples.jsonl")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert [(sample["prompt"], sample["sample"]) for sample in samples] == [(i, j) for i in range(4) for j in range(3)]
    assert (metrics["num_prompts"], metrics["num_samples"], metrics["model"]["eos_rate"]["n"]) == (4, 3, 4)
    assert len({sample["base"]["text"] for sample in samples[:3]}) > 1
    following = [sample["model"]["scores"]["instruction_following"] for sample in samples]
    right = [sum(following[i : i + 3]) for i in range(0, 12, 3)]
    headroom = metrics["headroom"]["model"]
    assert headroom["pass@1"]["value"] == pytest.approx(metrics["model"]["instruction_following"]["value"])
    assert headroom["pass@3"]["value"] == pytest.approx(sum(count > 0 for count in right) / 4)
    assert headroom["all_wrong"]["value"] == pytest.approx(sum(count == 0 for count in right) / 4)
    assert "Headroom of instruct: " in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_with_equal_logits_gets_no_marks(tiny, evaluate, tmp_path, temperature):
    model, tokenizer = load_model(str(tiny.model))
    model.get_output_embeddings().weight.data.zero_()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "flat")
    said = evaluate(tmp_path / "out", "--model", tmp_path / "flat", "--temperature", temperature)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["model"]["perplexity"]["value"] == pytest.approx(model.config.vocab_size, rel=1e-4)
    for name in ("instruction_following", "topic"):
        assert metrics["model"][name]["value"] < 0.1
    assert "No better than chance: instruct's instruction following" in said


def test_answers_are_those_of_each_prompt_alone(tiny, tmp_path):
    model, tokenizer = load_model(str(tiny.model))
    prompts = [tokenizer("Write a story about: " + "a kite " * i)["input_ids"] for i in range(5)]
    greedy = Sampling(temperature=0, max_new_tokens=16)
    journal = Journal(tmp_path / "j.jsonl", {})
    done = []
    together = Answering(tokenizer, prompts, 2, greedy, 3, journal).answers(model, "model", done.append)
    alone = [answer_all(model, tokenizer, [prompt], greedy, 1, lambda done: None)[0] for prompt in prompts]
    assert together == [answer for answer in alone for _ in range(2)]
    assert done == list(range(11))


def test_a_role_token_in_an_answer_is_seen(tiny, monkeypatch):
    model, tokenizer = load_model(str(tiny.model))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>"]})
    add_rows(model, tokenizer)
    script = iter([*tokenizer("He ran.")["input_ids"], len(tokenizer) - 1, tokenizer.eos_token_id])
    monkeypatch.setattr("fledge.generation.answers.choose", lambda *_: [next(script)])
    (answer,) = answer_all(model, tokenizer, [[5, 6]], Sampling(), 1, lambda done: None)
    assert (answer.text, answer.stopped) == ("He ran.<|user|>", True)


def rate(output_dir: Path, preferences: list[str], **changed) -> str:
    samples = read_lines(output_dir / "samples.jsonl")
    ratings = [
        {"prompt": sample["prompt"], "sample": sample["sample"], "preferred": preferred}
        for sample, preferred in zip(samples, preferences, strict=False)
    ]
    file = output_dir.parent / f"ratings{len(list(output_dir.parent.iterdir()))}.json"
    file.write_text(json.dumps({"answers": answers_id(samples), "ratings": ratings} | changed))
    return str(file)


def test_ratings_and_a_judge_that_is_down_need_no_new_answers(evaluate, tmp_path, monkeypatch):
    out = tmp_path / "out"
    evaluate(out)
    answers = (out / "answers.jsonl").read_bytes()
    ratings = rate(out, ["model", "model", "tie", "base"])
    monkeypatch.setattr("fledge.generation.answers.choose", None)  # an answer that is made again would fail
    judge = ("--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "nobody", "--judge_pairs", True)
    said = evaluate(out, "--resume", True, "--ratings", ratings, *judge)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert (out / "answers.jsonl").read_bytes() == answers
    assert {key: metrics["human"][key] for key in ("raters", "model", "base", "tie")} == {
        "raters": 1, "model": 2, "base": 1, "tie": 1,
    }  # fmt: skip
    assert metrics["human"]["preference"]["value"] == pytest.approx(2.5 / 4)
    assert metrics["llm_judge"]["scores"]["answers_without_score"] == 8
    assert metrics["llm_judge"]["preference"] is None
    assert "judge_score" not in metrics["model"]
    for text in (said, (out / "report.md").read_text(encoding="utf-8")):
        assert "8 of 8 answers have no score" in text
        assert "preferred instruct 2 times, base 1, neither 1" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("no JSON", "is not what the report's blind mode saves"),
        ("[]", "is not what"),
        ('{"answers": "x", "ratings": [{}]}', "is not what"),
        ('{"answers": "x", "ratings": [{"prompt": 0, "sample": 0, "preferred": "me"}]}', "is not what"),
    ],
)
def test_what_is_no_ratings_is_refused_before_any_work(evaluate, tmp_path, content, message):
    file = tmp_path / "ratings.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path / "out", "--ratings", file)
    assert not (tmp_path / "out").exists()


def test_ratings_of_other_answers_are_refused(evaluate, tmp_path):
    out = tmp_path / "out"
    evaluate(out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for changed in ({"answers": "x"}, {"ratings": [{"prompt": 99, "sample": 0, "preferred": "base"}]}):
        with pytest.raises(UserError, match="rates other answers than these"):
            evaluate(out, "--resume", True, "--ratings", rate(out, ["base"], **changed))
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "dev"], "has no split 'dev'; it has train, validation, test"),
        (["--num_prompts", 0], "--num_prompts 0 is out of range"),
        (["--num_samples", 0], "--num_samples 0 is out of range"),
        (["--judge_url", "http://localhost:1/v1"], "belong together"),
        *(
            (["--judge_url", url, "--judge_model", "x"], "is no address")
            for url in ("localhost", "http://", "http://[::1", "http://host:port/v1", "http://a host/v1")
        ),
        (["--judge_pairs", True], "--judge_pairs needs --judge_url"),
        (["--judge_timeout", 0], "--judge_timeout 0.0 is out of range"),
        (["--base", None], "--base is missing"),
        (["--model", "nowhere"], "There is no model at nowhere"),
        (["--dataset", "nowhere"], "budget.json is missing"),
        (["--temperature", -1], "temperature"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(evaluate, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate(tmp_path / "out", *arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_split_is_refused(evaluate, tmp_path, monkeypatch):
    def with_an_empty_test_split(folder):
        budget, tokenizer, splits = open_prepared(folder)
        splits["test"] = splits["test"].select([])
        return budget, tokenizer, splits

    monkeypatch.setattr("fledge.evaluation.prompts.open_prepared", with_an_empty_test_split)
    with pytest.raises(UserError, match=r"The test split of .* is empty"):
        evaluate(tmp_path / "out")


def test_a_dataset_of_an_unknown_task_is_refused(evaluate, tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    budget = json.loads((data / "budget.json").read_text(encoding="utf-8")) | {"task": "juggling"}
    (data / "budget.json").write_text(json.dumps(budget))
    with pytest.raises(UserError, match="prepared for 'juggling', which is no shipped task; name its file with --task"):
        evaluate(tmp_path / "out", "--dataset", data)


def test_a_model_of_another_vocabulary_is_refused(evaluate, tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny.base, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has another vocabulary"):
        evaluate(tmp_path / "out", "--base", model)


def test_a_model_beside_itself_is_refused(evaluate, tiny, tmp_path):
    (tmp_path / "base").symlink_to(tiny.model)
    with pytest.raises(UserError, match="base is --model itself; name the model that it was trained from"):
        evaluate(tmp_path / "out", "--base", tmp_path / "base")


def test_the_document_has_every_metric_and_key(tiny):
    document = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    names = {*wording.MEANING, *measuring.MEANING, *tiny.metrics, "human", "llm_judge"}
    assert {name for name in names if f"`{name}`" not in document} == set()


def test_recipes_ask_for_a_report():
    for recipe in (ROOT / "recipes").glob("*/evaluate.yaml"):
        assert {"model", "base", "dataset", "output_dir"} <= yaml.safe_load(recipe.read_text(encoding="utf-8")).keys()


def test_capabilities_shows_every_prompt_and_both_models(tiny, monkeypatch, capsys):
    arguments = ["--model", tiny.model, "--base", tiny.base, "--capabilities", "--max_new_tokens", 4]
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *map(str, arguments)])
    monkeypatch.setattr(
        "fledge.evaluation.capabilities.CAPABILITIES",
        {
            "words": [{"role": "user", "content": "Write a story using these words: kite"}],
            "who": [{"role": "user", "content": "Who is it?"}],
        },
    )  # the tiny model's context is too short for the story itself
    evaluate_model.main()
    said = capsys.readouterr().out
    assert said.index("words") < said.index("> Write a story using these words: kite") < said.index("> Who is it?")
    assert said.count("  base: ") == said.count("  instruct: ") == 2


def test_the_script_itself_says_a_mistake_in_one_line(tmp_path):
    done = run_script("evaluate_model.py", "--model", "nowhere", check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
