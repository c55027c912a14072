"""The lowest versions that pyproject.toml allows, as constraints for pip: `make test-lowest` installs them."""

import re
import tomllib
from pathlib import Path

# A name, or a name with extras, and its lower bound.
RANGE = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)")


def lowest(project: dict) -> list[str]:
    """`torch>=2.9,<3` → `torch==2.9`, for each package that the project or one of its extras names with a bound."""
    extras = project["optional-dependencies"].values()
    found = map(RANGE.match, [*project["dependencies"], *(entry for extra in extras for entry in extra)])
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    print("\n".join(lowest(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"])))
