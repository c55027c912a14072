"""Every command of the README and of docs/ is one that its program takes, and names files that are there by then."""

import argparse
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from string import Template

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, load_module
from keys import KEYS, keys_of

from fledge.cli import parse
from fledge.commands import COMMANDS

README = ROOT / "README.md"
DOCUMENTS = [
    README,
    *sorted(path for folder in ("docs", "recipes", "examples") for path in (ROOT / folder).rglob("*.md")),
]
OF_OTHERS = {"cp", "hf", "lm_eval", "npm", "transformers", "trl"}  # programs whose keys are not ours
OUTPUTS = {"--output_dir", "--output_file", "--out", "--picture"}
SHIPPED = {"benchmarks", "docs", "examples", "fledge", "model_card", "recipes", "tests"}
OWN_TEST = {"recipes/scale/prepare.py"}  # needs datatrove; tests/test_scale.py runs it
LEFT_OUT = {"…", "..."}  # stands for keys that a page does not repeat
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


class Parsed(Exception):
    """A script has parsed its keys; nothing else of it is run."""


def commands(document: Path) -> Iterator[list[str]]:
    """The words of each command line of a page, with its shell variables filled in."""
    for block in re.findall(
        r"^ *```bash\n(.*?)^ *```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        variables = {}
        block = re.sub(
            r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE
        )  # a program in another language
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(Template(line).safe_substitute(variables), comments=True)
            name, assigned, value = words[0].partition("=") if words else ("", "", "")
            if assigned:
                variables[name] = value
            elif name == "cd":  # the rest is done in a published folder
                break
            elif words:
                yield words


def started(words: list[str]) -> tuple[str, list[str]]:
    """The script that a command starts, and its arguments."""
    if words[:2] == ["accelerate", "launch"]:
        given = launch_command_parser().parse_args(words[2:])
        assert (ROOT / given.config_file).exists()
        return given.training_script, given.training_script_args
    if words[0] == "fledge":
        words = ["python", "-m", *words]
    assert words[0] == "python", words[0]
    if words[1:3] == ["-m", "fledge"]:
        return f"{COMMANDS[words[3]]}.py", words[4:]
    return words[1], words[2:]


def check_keys(script: str, arguments: list[str], patched: pytest.MonkeyPatch) -> None:
    is_whole = not LEFT_OUT & set(arguments) and "--help" not in arguments
    if script in KEYS:
        kinds = keys_of(script)
        recipe = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
        if is_whole and (recipe is None or Path(recipe).exists()):
            parse(arguments, *kinds)
        known = {f"--{entry.name}" for kind in kinds for entry in fields(kind)} | {"--config", "--help"}
        assert {word for word in arguments if word.startswith("--")} <= known
    elif is_whole and script not in OWN_TEST:
        parse_args = argparse.ArgumentParser.parse_args

        def stop(parser: argparse.ArgumentParser) -> None:
            parse_args(parser)
            raise Parsed

        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        patched.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed):
            load_module(ROOT / script).main()


def check_paths(arguments: list[str], made: set[str]) -> None:
    """What is read is shipped or was `made`, to which what is written is added."""
    key = ""
    for word in arguments:
        if word.startswith("--"):
            key = word
        elif key in OUTPUTS:
            made.add(word)
        elif word.partition("/")[0] in SHIPPED:
            assert (ROOT / word).exists(), word
        elif word.startswith("runs/"):
            assert any(word == output or word.startswith(f"{output}/") for output in made), f"nothing made {word}"


def made_by_recipe(name: str) -> set[str]:
    recipes = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in (ROOT / "recipes" / name).glob("*.yaml")]
    return {recipe["output_dir"] for recipe in recipes if "output_dir" in recipe}


@pytest.fixture(scope="module")
def made_before() -> set[str]:
    """What the README's commands and the recipes have made for a reader of another page."""
    names = [file.parent.name for file in (ROOT / "recipes").glob("*/evaluate.yaml")]
    made = set().union(*map(made_by_recipe, names))
    for words in commands(README):
        check_paths(words, made)
    return made


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_is_taken_and_finds_its_files(document, made_before, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = made_by_recipe("quickstart") if document == README else set(made_before)
    for words in commands(document):
        program = words[0]
        if program == "make":
            assert set(words[1:]) <= TARGETS, words
        elif program == "pip":
            named = ",".join(re.findall(r"(?:fledge-gpt|\.)\[(.*?)\]", " ".join(words))).split(",")
            assert set(filter(None, named)) <= EXTRAS.keys(), words
        elif words[:2] == ["bash", "recipes/run.sh"]:
            made |= made_by_recipe(words[2])
            assert (ROOT / "recipes" / words[2]).is_dir(), words
        elif program not in OF_OTHERS and words != ["fledge", "--help"]:
            script, arguments = started(words)
            if script != "-":
                with monkeypatch.context() as patched:
                    check_keys(script, arguments, patched)
            check_paths(arguments, made)


def test_the_readme_shows_every_stage_that_the_others_need():
    scripts = {started(words)[0] for words in commands(README) if words[0] in ("python", "accelerate")}
    assert scripts >= {
        f"{COMMANDS[name]}.py" for name in ("convert", "prepare", "train", "evaluate", "generate", "publish")
    }
