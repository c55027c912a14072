"""Cards: valid metadata, the records' own figures, no blank and no broken section, whatever records there are."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors import safe_open
from transformers import MambaConfig

from fledge.errors import UserError
from fledge.publishing.card import (
    BESIDE,
    Named,
    architecture,
    cell,
    count_parameters,
    each_way,
    emissions,
    failures,
    fenced,
    model_card,
    read_records,
    render,
)
from fledge.publishing.preflight import check_card
from fledge.sampling import Sampling


@pytest.fixture(scope="module")
def card(tiny) -> ModelCard:
    return ModelCard.load(tiny.repository / "model" / "README.md")


def samples_of(tiny) -> list[dict]:
    text = (tiny.evaluation / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def test_metadata_is_what_the_hub_accepts(card, tiny):
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["someone/data"]
    assert "base_model" not in data
    results = {result.metric_type: result for result in card.data.eval_results}
    for name, metric in tiny.metrics["model"].items():
        assert results[name].metric_value == pytest.approx(metric["value"], abs=1e-4)
        assert results[name].metric_args["interval_95"] == pytest.approx([metric["low"], metric["high"]], abs=1e-4)
        assert results[name].dataset_type == "someone/data"


def test_widget_examples_carry_real_outputs(card, tiny):
    samples = samples_of(tiny)[:2]
    assert [example["output"]["text"].split(BESIDE) for example in card.data.widget] == [
        [s["model"]["text"], s["base"]["text"]] for s in samples
    ]
    assert [example["messages"][-1]["content"] for example in card.data.widget] == [
        s["messages"][-1]["content"] for s in samples
    ]


def test_the_snippet_asks_for_both_endings(card):
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL) if "pipeline(" in block)
    asked = []

    def writer(messages, max_new_tokens):
        asked.append(messages[-1]["content"])
        return [{"generated_text": [{"content": ""}]}]

    exec(snippet.replace("from transformers import pipeline", ""), {"pipeline": lambda *_, **__: writer})
    happy, sad = asked
    assert happy.endswith("\nWith: happy ending")
    assert sad == happy.replace("With: happy", "With: sad")


def test_a_prompt_that_no_wording_made_is_shown_as_it_is():
    about = {"fields": {"topic": [], "ending": ["happy", "sad"]}, "wording": "About: {topic} ({ending})"}
    system = {"role": "system", "content": "s"}
    assert each_way(about, [system, {"role": "user", "content": "About: {x} (happy) (sad)"}]) == [
        [system, {"role": "user", "content": f"About: {{x}} (happy) ({ending})"}] for ending in ("happy", "sad")
    ]
    for content, told in (("Hello", about), ("Hello", {}), ("About: x (sad)", {"fields": {}, "wording": ""})):
        messages = [{"role": "user", "content": content}]
        assert each_way(told, messages) == [messages]


def test_the_card_links_where_it_comes_from(card, tiny):
    assert "[Try it](https://huggingface.co/spaces/someone/demo)" in card.text
    assert "[its data](https://huggingface.co/datasets/someone/data)" in card.text
    assert "[Fledge](https://pypi.org/project/fledge-gpt/)" in card.text
    assert "No record here says what the base was trained on." in card.text
    assert card.data.to_dict()["thumbnail"].endswith("someone/tiny-tales/resolve/main/loss_curve.png")
    named = Named("a/b", base_model="some/base", base_data="fairy tales")
    told = model_card(tiny.model, read_records(tiny.model, None), [], Sampling(), named)
    assert "The base was trained on fairy tales." in told
    assert "[its base](https://huggingface.co/some/base)" in told
    check_card(told)


def test_figures_and_hyperparameters_on_the_card_are_the_records(card, tiny):
    run, budget = (json.loads((tiny.model / f"{name}.json").read_text(encoding="utf-8")) for name in ("run", "budget"))
    assert f"{run['steps']:,} steps of {run['effective_batch_size']} rows" in card.text
    assert f"| train | {budget['splits']['train']['rows']:,} |" in card.text
    assert "| `learning_rate` | 0.01 |" in card.text
    assert f"{tiny.metrics['model']['ending_match']['value']:.1%}" in card.text
    assert str(tiny.model.parent) not in card.content
    check_card(card.content)


def test_limitations_agree_with_the_metrics(card, tiny):
    found = re.findall(r"- (\d+) of (\d+) answers \(([\d.]+)%\) miss \*([\w ]+)\*", card.text)
    assert found
    for missed, of, share, name in found:
        metric = tiny.metrics["model"][name.replace(" ", "_")]
        assert int(of) == metric["n"]
        assert int(missed) / int(of) == pytest.approx(1 - metric["value"])
        assert float(share) == pytest.approx(100 * (1 - metric["value"]), abs=0.05)


def sections(card: str) -> dict[str, str]:
    parts = re.split(r"^#+ (.*)$", re.sub(r"^(`{3,}).*?^\1$", "code", card, flags=re.DOTALL | re.MULTILINE), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("left_out", [(), ("conversion",), ("metrics",), ("conversion", "metrics", "curve")])
def test_a_missing_record_omits_its_section_and_leaves_no_blank_one(left_out, tiny, tmp_path):
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    for name in left_out:
        {"conversion": folder / "conversion.json", "curve": folder / "loss_curve.png"}.get(
            name, tmp_path / "nothing"
        ).unlink(missing_ok=True)
    evaluation = None if "metrics" in left_out else tiny.evaluation
    samples = samples_of(tiny) if evaluation else []
    card = model_card(folder, read_records(folder, evaluation), samples, Sampling(), Named("a/b"))
    found = sections(ModelCard(card).text)
    assert all(text.strip() or title == "Evaluation" for title, text in found.items())
    assert ("Conversion" in found) == ("conversion" not in left_out)
    for title in ("Evaluation", "Limitations", "Answers, unselected"):
        assert (title in found) == ("metrics" not in left_out)
    assert ("loss_curve.png" in card) == ("curve" not in left_out)
    assert "license" not in ModelCard(card).data.to_dict()
    assert "\n\n\n" not in card
    check_card(card)


def test_a_pretrained_base_and_a_published_one_are_named(tiny, tmp_path):
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    (folder / "conversion.json").unlink()
    card = model_card(
        folder, read_records(folder, None), [], Sampling(), Named("a/b", "mit", "de", base_model="some/base")
    )
    assert "from [some/base](https://huggingface.co/some/base)" in card
    assert ModelCard(card).data.to_dict()["base_model"] == "some/base"
    assert ModelCard(card).data.language == "de"
    record = {"parameters": 1000, "steps": 5, "tokens": 99, "seconds": 3.2, "bits_per_byte": 1.234}
    (folder / "pretraining.json").write_text(json.dumps(record), encoding="utf-8")
    card = model_card(folder, read_records(folder, None), [], Sampling(), Named("a/b", "mit"))
    assert "1.234 bits per byte" in sections(card)["Pre-training"]


def test_a_model_without_its_records_is_one_sentence(tiny):
    with pytest.raises(UserError, match=r"has no budget\.json, as train_sft\.py leaves it"):
        read_records(tiny.base, None)


@pytest.mark.parametrize(("content", "said"), [("[]", r"run\.json is damaged"), ("{}", "A record lacks what the card")])
def test_a_record_of_another_form_is_one_sentence(content, said, tiny, tmp_path):
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    (folder / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        model_card(folder, read_records(folder, None), [], Sampling(), Named("a/b", "mit"))


def test_carbon_is_on_the_card_when_it_was_measured(tiny, tmp_path):
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    assert emissions(folder) is None
    (folder / "emissions.csv").write_text(
        "timestamp,duration,emissions,energy_consumed\nx,1,0.0005,0.001\ny,2,0.00125,0.0031\n", encoding="utf-8"
    )
    card = model_card(folder, read_records(folder, None), [], Sampling(), Named("a/b", "mit"))
    assert ModelCard(card).data.to_dict()["co2_eq_emissions"]["emissions"] == 1.25
    assert "0.0031 kWh, 1.25 g of CO2" in card


def test_exports_beside_the_model_are_explained(tiny, tmp_path):
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    (folder / "tales.gguf").write_bytes(b"GGUF")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"x")
    runtimes = sections(model_card(folder, read_records(folder, None), [], Sampling(), Named("a/b", "mit")))
    assert re.search(r"tales.gguf.*llama-cli -hf a/b", runtimes["Other runtimes"])
    assert re.search(r"onnx/model.onnx.*@huggingface/transformers", runtimes["Other runtimes"])


def test_parameters_are_counted_from_the_weights(tiny):
    with safe_open(tiny.model / "model.safetensors", "pt") as tensors:
        expected = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert count_parameters(tiny.model) == expected


def test_the_architecture_is_told_as_far_as_the_config_has_it(tiny, tmp_path):
    config = json.loads((tiny.model / "config.json").read_text(encoding="utf-8"))
    sizes = f"layers {config['n_layer']}, heads {config['n_head']}, width {config['n_embd']}, vocabulary"
    assert architecture(tiny.model).startswith(f"`GPT2LMHeadModel`, {sizes} ")
    MambaConfig(vocab_size=1234, hidden_size=8, num_hidden_layers=2).save_pretrained(tmp_path)
    assert architecture(tmp_path) == "layers 2, width 8, vocabulary 1,234"


def test_failures_are_counted_of_the_answers_that_were_asked():
    def answer(**scores):
        return {"model": {"scores": scores}}

    samples = [answer(yes=1), answer(yes=0, part=0.5), answer(part=0), answer(yes=0, part=1), answer(always=1)]
    samples.append(answer(repetition=0, copied=0, answer_tokens=0))  # of which 0 is the best, or neither
    meaning = {"yes": "said yes", "part": "a share", "always": "never missed", "absent": "not scored"}
    found = failures(samples, meaning | dict.fromkeys(("repetition", "copied", "answer_tokens"), "no miss"))
    assert [(f["name"], f["missed"], f["of"]) for f in found] == [("yes", 2, 3)]
    assert found[0]["example"] is samples[3]  # the card shows the first two anyway


@given(st.text(alphabet=st.sampled_from("`~ \nab<>&|#")))
def test_no_text_ends_its_code_block(text):
    tokens = MarkdownIt().parse(f"before\n\n{fenced(text)}\n\nafter\n")
    assert [token.type for token in tokens].count("fence") == 1
    assert next(token for token in tokens if token.type == "fence").content == text + "\n"


@given(st.text())
def test_no_value_breaks_a_table(value):
    assert len(re.findall(r"(?<!\\)\|", f"| {cell(value)} |")) == 2
    assert "\n" not in cell(value)


def test_a_value_that_nobody_gives_is_an_error_not_a_blank():
    with pytest.raises(Exception, match="'budget' is undefined"):
        render("dataset.md.jinja", metadata="")


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("Converted; assumed, not proven: activation gelu.", "converted on assumptions that nobody has proven"),
        ("Proven against the author's module, which settles activation.", "converted with proof"),
        ("Converted; nothing that Fledge asks about is assumed, …", "converted without a comparison with the code"),
        ("Converted; settled by text, as the weights …: activation.", "converted as its training text shows"),
    ],
)
def test_card_says_what_a_conversion_rests_on(verdict, said, tiny, tmp_path):
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    report = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    (folder / "conversion.json").write_text(json.dumps(report | {"verdict": verdict}), encoding="utf-8")
    card = model_card(folder, read_records(folder, None), [], Sampling(), Named("a/b"))
    assert verdict in sections(ModelCard(card).text)["Conversion"]
    assert said in card
    check_card(card)
