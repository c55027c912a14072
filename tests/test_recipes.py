import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from keys import keys_of

from fledge.cli import parse
from fledge.errors import UserError

OF_OTHERS = ("accelerate", "lm_eval", "trl")  # files that other programs read
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name not in OF_OTHERS)


# The stage that a recipe's file is for → its script, as in recipes/run.sh.
SCRIPTS = {
    "tokenizer": "train_tokenizer.py",
    "pretrain": "pretrain.py",
    "trim": "trim_vocabulary.py",
    "convert": "convert_checkpoint.py",
    "answers": "evaluate_model.py",
    "prepare": "prepare_dataset.py",
    "train": "train_sft.py",
    "train_lora": "train_sft.py",
    "dpo": "train_dpo.py",
    "grpo": "train_grpo.py",
    "evaluate": "evaluate_model.py",
    "generate": "generate.py",
    "publish": "publish.py",
    "demo": "publish.py",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_script_accepts_every_key_of_a_recipe(recipe: Path):
    parsed = parse(["--config", str(recipe)], *keys_of(SCRIPTS[recipe.stem]))
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for key, value in written.items():
        holder = next(part for part in parsed if hasattr(part, key))
        assert getattr(holder, key) == value


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_unknown_key_is_refused(recipe: Path, tmp_path):
    spoiled = tmp_path / "recipe.yaml"
    spoiled.write_text(recipe.read_text(encoding="utf-8") + "learning_raet: 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="learning_raet"):
        parse(["--config", str(spoiled)], *keys_of(SCRIPTS[recipe.stem]))


def test_stages_of_a_recipe_hand_on_the_same_folders():
    for folder in {recipe.parent for recipe in RECIPES}:
        stages = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yaml")}

        def handed_on(stage: str, key: str, *makers: str, stages=stages) -> bool:
            """What a stage reads is what the first of its makers wrote, if the recipe has the two."""
            made = next((stages[maker]["output_dir"] for maker in makers if maker in stages), None)
            return stage not in stages or made is None or stages[stage][key] == made

        bases = ("convert", "trim", "pretrain")
        assert handed_on("prepare", "tokenizer", *bases), folder
        assert handed_on("train", "model_name_or_path", *bases), folder
        assert handed_on("pretrain", "tokenizer", "tokenizer"), folder
        assert handed_on("trim", "model", "pretrain"), folder
        assert handed_on("train", "dataset", "prepare"), folder
        assert all(
            handed_on(stage, "model", "train", "dpo", "grpo") for stage in ("evaluate", "publish", "generate", "demo")
        ), folder
        assert handed_on("grpo", "model_name_or_path", "train"), folder
        assert all(handed_on(stage, "dataset", "prepare") for stage in ("dpo", "grpo")), folder
        if "answers" in stages:
            assert stages["prepare"]["data"] == [stages["answers"]["output_dir"]], folder
            assert stages["answers"]["model"] == stages["prepare"]["tokenizer"], folder
        assert handed_on("demo", "base", *bases), folder
        if "train_lora" in stages:
            for key in ("model_name_or_path", "dataset"):
                assert stages["train_lora"][key] == stages["train"][key]
            assert stages["train_lora"]["output_dir"] == stages["train"]["output_dir"] + "_lora"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RECIPES if path.stem == "generate"))
def test_the_last_screen_asks_as_the_recipe_does(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    command = importlib.import_module("show").next_command(ROOT / "recipes" / name)
    asked, _ = parse(command[2:], *keys_of("generate.py"))
    recipe, _ = parse(["--config", f"recipes/{name}/generate.yaml"], *keys_of("generate.py"))
    assert all(vars(asked)[key] == vars(recipe)[key] for key in ("model", "topic", "words", "constraints", "prompt"))


@pytest.mark.parametrize(("columns", "beside"), [(100, True), (40, False)])
def test_the_last_screen_tells_one_topic_twice(columns, beside, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    monkeypatch.setenv("COLUMNS", str(columns))
    answers = importlib.import_module("show").answers
    (tmp_path / "happy.txt").write_text("The fox found a friend.\n", encoding="utf-8")
    (tmp_path / "sad.txt").write_text("The fox was alone.\n", encoding="utf-8")
    lines = answers(tmp_path).splitlines()
    assert any("found a friend" in line and "was alone" in line for line in lines) == beside
    assert "A happy ending" in lines[0]
    (tmp_path / "happy.txt").unlink()
    (tmp_path / "answer.txt").write_text("Forty-two.\n", encoding="utf-8")
    assert answers(tmp_path).splitlines() == ["An answer", "Forty-two."]


def test_trl_reads_its_recipe():
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    arguments = ["--config", str(ROOT / "recipes" / "trl" / "sft.yaml"), "--use_cpu", "true"]
    script, config, model = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(arguments)
    assert script.dataset_name == "runs/trl/data/data"
    assert config.chat_template_path == "runs/trl/data/tokenizer"
    assert model.model_name_or_path == "runs/story_chat/base"


def test_accelerate_reads_its_configs():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in (ROOT / "recipes" / "accelerate").glob("*.yaml"):
        assert load_config_from_file(str(path)).num_processes >= 1


@pytest.fixture
def run_recipe(tmp_path):
    """Runs run.sh from an empty folder with programs that only note what they were asked, and returns that."""
    if sys.platform == "win32":
        pytest.skip("needs bash")
    programs, log = tmp_path / "programs", tmp_path / "log"
    programs.mkdir()
    for name in ("python", "accelerate"):
        (programs / name).write_text(f'#!/bin/sh\necho "$@" >> {log}\n', encoding="utf-8")
        (programs / name).chmod(0o755)

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        log.write_text("", encoding="utf-8")
        done = subprocess.run(
            ["bash", ROOT / "recipes" / "run.sh", *map(str, arguments)], cwd=tmp_path, check=False, text=True,
            capture_output=True, env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
        )  # fmt: skip
        return done.returncode, done.stderr, log.read_text(encoding="utf-8").splitlines()

    return run


@pytest.mark.parametrize(
    ("given", "said"),
    [((), "name one recipe"), (("nope",), "choose one of alpaca constraints"), (("./nope",), "there is no folder"),
     (("accelerate",), "recipes/accelerate has no evaluate.yaml")],
)  # fmt: skip
def test_a_wrong_recipe_is_one_sentence(run_recipe, given, said):
    code, told, asked = run_recipe(*given)
    assert (code, asked, len(told.splitlines())) == (2, [], 1)
    assert said in told


def test_a_recipe_of_ones_own_goes_on_where_it_was_interrupted(run_recipe, tmp_path):
    recipe, runs = shutil.copytree(ROOT / "recipes" / "topic_ending_30m", tmp_path / "my recipe"), tmp_path / "runs"
    for file in recipe.iterdir():
        text = file.read_text(encoding="utf-8").replace("runs/topic_ending_30m", str(runs))
        file.write_text(text, encoding="utf-8")
    runs.mkdir()
    stages = ("convert", "prepare", "train", "evaluate", "generate", "generate", "publish")

    code, _, asked = run_recipe("./my recipe")
    assert code == 0
    assert [Path(line.split(f"{recipe}/")[1]).stem for line in asked[:-1]] == list(stages)
    assert asked[-1] == f"recipes/show.py {recipe}"
    assert not any("--resume" in line for line in asked)
    for name in ("base", "data"):
        (runs / name).mkdir()
        (runs / name / ".fledge.json").write_text("{}", encoding="utf-8")
    (runs / "model" / "checkpoints").mkdir(parents=True)
    _, told, asked = run_recipe(recipe)
    assert f"{runs}/base is finished and stays" in told
    assert asked[0].startswith("launch")
    assert asked[0].endswith("train.yaml --resume auto")
    assert [line.split()[0] for line in asked[1:3]] == ["evaluate_model.py", "generate.py"]
