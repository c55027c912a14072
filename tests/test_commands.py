"""The command `fledge`, its functions, and how messages name the stages."""

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

import fledge
from fledge import __main__, api
from fledge.commands import COMMANDS, command, in_commands, next_command, started_as

SENTENCE = (
    "budget.json is missing; {} writes it. Run {}, accelerate launch {}, accelerate launch --multi_gpu {} or "
    "torchrun --nproc_per_node COUNT {}."
)
SCRIPTS = SENTENCE.format("prepare_dataset.py", "python train_sft.py", *["train_sft.py"] * 3)
MODULE = ["-m fledge train"] * 3


@pytest.mark.parametrize(
    ("start", "following", "sentence"),
    [
        ("prepare_dataset.py", "python train_sft.py", SCRIPTS),
        ("fledge prepare", "fledge train", SENTENCE.format("fledge prepare", "fledge train", *MODULE)),
        ("fledge.prepare", "fledge.train", SENTENCE.format("fledge.prepare", "fledge.train", *MODULE)),
    ],
)
def test_messages_name_a_stage_as_this_one_was_started(start, following, sentence):
    with started_as(start, []):
        assert command("train_sft.py") == following
        assert in_commands(SCRIPTS) == sentence


def test_the_next_command_is_whole(tmp_path):
    used, suggested = {"model": "my model", "base": "runs/base"}, {"output_dir": "evaluation"}
    with started_as("train_sft.py", []):
        whole = "--model 'my model' --base runs/base --output_dir evaluation"
        assert next_command("evaluate_model.py", used, suggested) == f"python evaluate_model.py {whole}"
        assert next_command("pretrain.py", {"data": ["a b", "c"]}, {}) == "python pretrain.py --data 'a b' c"
    with started_as("fledge.train", []):
        said = next_command("evaluate_model.py", {"model": "m", "base": None}, suggested)
        assert said == "fledge.evaluate(model='m', output_dir='evaluation')"
    recipe = tmp_path / "evaluate.yaml"
    recipe.write_text("model: runs/model\nbase: runs/base\noutput_dir: elsewhere\n", encoding="utf-8")
    for given in (["--config", str(tmp_path / "train.yaml")], [f"--config={tmp_path / 'train.yaml'}"]):
        with started_as("fledge train", [*given, "--max_steps", "2"]):
            # The recipe says the rest; where its paths are not those just used, it must not write over its own output.
            for model, said in (("runs/model", ""), ("other", " --model other --output_dir evaluation")):
                made = next_command("evaluate_model.py", used | {"model": model}, suggested)
                assert made == f"fledge evaluate --config {recipe}{said}"


@pytest.mark.parametrize("text", ["src/generate.py is no text", "my_export.py", "./publish.py", "generate.python"])
def test_a_file_of_the_users_keeps_its_name(text):
    with started_as("fledge generate", []):
        assert in_commands(text) == text


def test_each_script_is_a_command_and_a_function():
    scripts = {path.stem for path in (ROOT / "fledge" / "scripts").glob("[!_]*.py")}
    assert scripts == set(COMMANDS.values()) == {path.stem for path in ROOT.glob("*.py")} - {"setup"}
    assert {name.replace("-", "_") for name in COMMANDS} <= set(fledge.__all__)


def test_help_lists_each_command_and_imports_nothing_heavy():
    listed = run_script("-X", "importtime", "-m", "fledge", "--help")
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S", listed.stdout, re.MULTILINE)
    imported = {line.rpartition("|")[2].strip() for line in listed.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "transformers", "numpy", "datasets", "trl"})


def test_help_survives_an_output_that_knows_no_arrows():
    assert "A checkpoint" not in run_script("-m", "fledge", "--help", PYTHONIOENCODING="ascii").stderr


def test_an_unknown_command_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fledge", "trian", "--max_steps", "3"])
    with pytest.raises(SystemExit, match="2"):
        __main__.started()
    assert capsys.readouterr().err.startswith("fledge: trian is no command of fledge; choose one of convert, prepare, ")


def test_a_command_says_its_name_in_errors_and_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fledge", "generate", "--model", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        __main__.started()
    assert capsys.readouterr().err.startswith("fledge generate: Nothing is asked; ")
    monkeypatch.setattr(sys, "argv", ["fledge", "generate", "--help"])
    with pytest.raises(SystemExit, match="0"):
        __main__.started()
    told = capsys.readouterr().out
    assert "usage: fledge generate --model MODEL" in told
    assert "\nfledge generate --model model --interactive\n" in told
    assert "generate.py" not in told


def test_a_function_takes_what_python_has_for_a_value():
    written = fledge.Written(Path("a b"), {})
    values = {"a": 3, "b": 1e-05, "c": True, "d": ["x", 2], "e": {"f": None}, "g": written, "h": "-x"}
    parts = [part for key, value in values.items() for part in api._argument(key, value)]
    assert parts == ["--a=3", "--b=1e-05", "--c=True", "--d", "x", "2", '--e={"f": null}', "--g=a b", "--h=-x"]


def test_a_functions_mistake_is_an_exception_that_names_functions(tmp_path):
    arguments = sys.argv
    (tmp_path / "model.pt").touch()
    with pytest.raises(fledge.UserError, match=r"no config.json; fledge.convert makes a model of a checkpoint"):
        fledge.evaluate(model=tmp_path, base=tmp_path, dataset=tmp_path, output_dir=tmp_path / "out")
    with pytest.raises(fledge.UserError, match="--nonsense is unknown"):
        fledge.prepare(data="x", tokenizer="y", output_dir=tmp_path / "out", nonsense=1)
    with pytest.raises(fledge.UserError, match="needs a terminal"):
        fledge.generate(model=tmp_path, interactive=True)
    assert sys.argv is arguments


@pytest.mark.slow
def test_functions_return_what_was_written_and_answered(tiny, tmp_path, capsys):
    asked = {"max_new_tokens": 5, "num_samples": 2}
    answers = fledge.generate(model=tiny.model, topic="A cat.", ending="sad", compare=tiny.base, **asked)
    assert len(answers) == 4
    assert capsys.readouterr().out == ""
    prompts, file = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("Tell me a story.\nAnother one.\n", encoding="utf-8")
    assert len(fledge.generate(model=tiny.model, prompts_file=prompts, output_file=file, **asked)) == 4
    data = fledge.prepare(data=tiny.records, tokenizer=tiny.base, split="80/10/10", limit=60, output_dir=tmp_path / "d")
    assert Path(data) == tmp_path / "d"
    assert data.record["splits"].keys() == {"train", "validation", "test"}
    assert fledge.convert(checkpoint=tiny.checkpoint, inspect=True) is None


def test_nothing_names_the_package_of_another_project():
    """`fledge` on PyPI is not ours: the distribution is fledge-gpt."""
    files = [ROOT / name for name in ("README.md", "pyproject.toml", "CONTRIBUTING.md")]
    for folder in ("fledge", "docs", "model_card", "recipes", "examples"):
        files += [
            path
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".md", ".sh", ".jinja", ".txt", ".ipynb")
        ]
    strange = re.compile(r"pip install[^\n]*[ '\"]fledge(?![-\w])|['\"]fledge\[")
    assert [str(path) for path in files if strange.search(path.read_text(encoding="utf-8"))] == []
