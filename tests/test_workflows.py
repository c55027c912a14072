"""What runs outside of pytest: workflows, hooks, make targets, bounds of versions, and other systems than Linux."""

import ast
import re
import tomllib

import pytest
import yaml
from conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Modules of the standard library that Windows lacks, and what its os and signal lack.
UNIX_ONLY = {"crypt", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
UNIX_NAMES = re.compile(
    r"\bos\.(fork|getuid|geteuid|killpg|setsid|mkfifo|uname)\b|\bsignal\.(SIGKILL|SIGHUP|SIGUSR1|alarm)"
)


def commands(workflow: dict) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_names_targets_and_paths_that_exist(file):
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    run = commands(workflow)
    made = [target for command in run for target in re.findall(r"\bmake ([\w-]+)", command)]
    assert set(made) <= targets
    named = [path for command in run for path in re.findall(r"[\w./-]+\.(?:py|yaml|txt)\b", command)]
    named += [
        step["working-directory"]
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if "working-directory" in step
    ]
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_ci_lints_and_tests_on_the_lowest_versions_and_on_other_systems():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert {"make lint", "make test", "make test-lowest"} <= set(commands(workflow))
    systems = workflow["jobs"]["systems"]["strategy"]["matrix"]["system"]
    assert {system.partition("-")[0] for system in systems} == {"macos", "windows"}


def test_the_makefile_names_tests_and_files_that_exist():
    named = re.findall(r"\b(?:tests|benchmarks|recipes)/[\w./-]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"tests/checkpoints", "tests/judges"} <= set(named)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_markers_that_are_chosen_by_name_are_declared(pytestconfig):
    declared = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    files = [ROOT / "Makefile", *WORKFLOWS]
    chosen = [
        name
        for file in files
        for text in re.findall(r'-m "([^"]+)"', file.read_text(encoding="utf-8"))
        for name in re.findall(r"\w+", text)
    ]
    assert {"slow", "browser", "network"} <= set(chosen) - {"not", "and"} <= declared


@pytest.mark.parametrize(
    "file",
    [
        ".pre-commit-config.yaml",
        "CITATION.cff",
        *(f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "checkpoint", "config")),
    ],
)
def test_yaml_beside_the_code_is_yaml(file):
    assert isinstance(yaml.safe_load((ROOT / file).read_text(encoding="utf-8")), dict)


def test_tools_have_the_version_that_is_tested():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (ruff,) = (hook["rev"] for hook in hooks["repos"] if hook["repo"].endswith("/ruff-pre-commit"))
    assert f"\nruff=={ruff.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_citation_and_package_have_one_version():
    import fledge

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert citation["version"] == project == fledge.__version__


def test_lowest_versions_are_within_those_that_are_tested():
    """A bound above the tested version would be one that nobody has tried."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    named = map(Requirement, [*project["dependencies"], *(entry for extra in extras for entry in extra)])
    bounds = [(one.name, bound) for one in named for bound in one.specifier]
    lowest = {name: bound.version for name, bound in bounds if bound.operator == ">="}
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    tested = {
        name.replace("_", "-"): version for name, version in re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE)
    }
    assert {"torch", "transformers", "trl", "datasets", "pytest"} <= lowest.keys()
    later = {name for name, version in lowest.items() if Version(version) > Version(tested[name.replace("_", "-")])}
    assert later == set()


def test_all_that_windows_lacks_is_asked_for_before_it_is_used():
    files = [path for folder in ("fledge", "model_card") for path in (ROOT / folder).rglob("*.py")] + list(
        ROOT.glob("*.py")
    )
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: {name}" for name in names if name in UNIX_ONLY]
        found += [f"{path.name}: {name[0]}" for name in UNIX_NAMES.finditer(text)]
    assert found == []


def test_the_image_is_slim_runs_as_a_user_and_starts_the_quickstart():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    said = {line.split()[0]: line.partition(" ")[2] for line in lines if re.match(r"[A-Z]+ ", line)}
    assert said["FROM"].endswith("-slim")
    assert said["USER"] == "1000"  # not root
    command = yaml.safe_load(said["CMD"])
    assert command == ["bash", "recipes/run.sh", "quickstart"]
    assert (ROOT / command[1]).exists()
    assert "runs" in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    built = commands(yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")))
    assert {"docker build --tag fledge .", "docker run --rm fledge"} <= set(built)
