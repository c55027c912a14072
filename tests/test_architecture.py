"""The rooms of docs/architecture.md are those of the code, and no import runs against their order.

`python tests/test_architecture.py` draws the picture of the page again.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)
GROUND = "ground"
Imports = dict[str, set[str]]  # module → the modules it imports


def imports_of(package: Path) -> Imports:
    """What each module of a package imports of it, at its beginning or later, absolutely or relatively."""
    files = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found = {}
    for module, file in files.items():
        inside = module if file.stem == "__init__" else module.rpartition(".")[0]
        named = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = inside.split(".")[: len(inside.split(".")) + 1 - node.level] if node.level else []
                source = ".".join([*above, *filter(None, [node.module])])
                # A name may be a module of a package, or what the package itself defines.
                named.update(full if (full := f"{source}.{alias.name}") in files else source for alias in node.names)
        found[module] = (named & files.keys()) - {module}
    return found


def room_of(module: str) -> str:
    """The first name below the package; the package itself is the room `__init__`."""
    return [*module.split("."), "__init__"][1]


def rows(page: str) -> list[tuple[str, list[str]]]:
    """The table of rooms: a name for each row and its rooms, from the ground up. A row of several is the ground."""
    found = [re.findall(r"`(\w+)`", cell) for cell in re.findall(r"^\| (`\w+`.*?) \| .+\|$", page, re.MULTILINE)]
    return [(GROUND if len(rooms) > 1 else rooms[0], rooms) for rooms in found]


def against(imports: Imports, order: list[str]) -> list[str]:
    """The imports of a room by one that does not lie above it."""
    place = {room: number for number, room in enumerate(order)}
    return sorted(
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if room_of(module) != room_of(other) and place[room_of(module)] <= place[room_of(other)]
    )


def cycle(imports: Imports) -> list[str]:
    """Modules that import one another in a circle; empty if none do."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def picture(imports: Imports, table: list[tuple[str, list[str]]]) -> str:
    """Mermaid: an arrow from each room to what it imports, unless a longer way leads there as well."""
    node = {room: name for name, rooms in table for room in rooms}
    arrows = {name: set() for name, _ in table}
    for module, others in imports.items():
        arrows[node[room_of(module)]] |= {node[room_of(other)] for other in others} - {node[room_of(module)]}
    below = {}
    for name in TopologicalSorter(arrows).static_order():
        below[name] = arrows[name].union(*(below[other] for other in arrows[name]))
    lines = ["flowchart TD"]
    for name, _ in reversed(table):
        direct = [o for o in arrows[name] if not any(o in below[other] for other in arrows[name])]
        lines += [f"    {name} --> {other}" for other in sorted(direct)]
    return "\n".join(lines) + "\n"


IMPORTS = imports_of(ROOT / "fledge")
TEXT = PAGE.read_text(encoding="utf-8")
TABLE = rows(TEXT)
ORDER = [room for _, rooms in TABLE for room in rooms]


def test_every_room_has_its_row():
    assert sorted(ORDER) == sorted({room_of(module) for module in IMPORTS})


def test_no_import_runs_against_the_order():
    assert against(IMPORTS, ORDER) == []


def test_no_modules_import_one_another_in_a_circle():
    assert cycle(IMPORTS) == []


def test_the_picture_is_that_of_the_imports():
    assert PICTURE.search(TEXT)[1] == picture(IMPORTS, TABLE), "run: python tests/test_architecture.py"


def test_every_place_that_the_page_names_is_there():
    places = set(re.findall(r"`((?:fledge|tests|model_card)/[\w./]*)`", TEXT))
    assert len(places) > 20
    assert [place for place in sorted(places) if not (ROOT / place).exists()] == []


@pytest.fixture
def house(tmp_path):
    """A package of three rooms in which every import runs down; returns a function that adds a file."""

    def write(name: str, text: str) -> Path:
        file = tmp_path / "house" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return tmp_path / "house"

    write("__init__.py", "from house.roof import tile\n")
    write("stone.py", "import os\n")
    write("cellar/__init__.py", "")
    write("cellar/shelf.py", "from house.stone import os\n")
    write("roof/__init__.py", "")
    write("roof/tile.py", "import house.cellar.shelf\n\n\ndef late():\n    from ..stone import os\n")
    return write


HOUSE = ["stone", "cellar", "roof", "__init__"]


def test_a_house_in_order_is_found_so(house):
    imports = imports_of(house("stone.py", "import os\n"))
    assert imports["house.roof.tile"] == {"house.cellar.shelf", "house.stone"}
    assert against(imports, HOUSE) == cycle(imports) == []
    table = [(name, [name]) for name in HOUSE]
    arrows = "    __init__ --> roof\n    roof --> cellar\n    cellar --> stone\n"
    assert picture(imports, table) == "flowchart TD\n" + arrows


@pytest.mark.parametrize(
    "planted",
    [
        "import house.roof.tile\n",
        "from house.roof.tile import late\n",
        "from house.roof import tile\n",
        "from house import roof\n",
        "from ..roof import tile\n",
        "from .. import roof\n",
        "def later():\n    import house.roof.tile as t\n",
        "if False:\n    from house.roof.tile import late\n",
    ],
)
def test_a_planted_import_against_the_order_is_found(house, planted):
    imports = imports_of(house("cellar/shelf.py", planted))
    assert len(found := against(imports, HOUSE)) == 1
    assert found[0].startswith("house.cellar.shelf imports house.roof")


def test_a_planted_circle_within_a_room_is_found(house):
    house("cellar/box.py", "from .shelf import board\n")
    imports = imports_of(house("cellar/shelf.py", "def board():\n    from house.cellar import box\n"))
    assert against(imports, HOUSE) == []
    assert set(cycle(imports)) == {"house.cellar.box", "house.cellar.shelf"}


if __name__ == "__main__":
    drawn = PICTURE.sub(lambda _: f"```mermaid\n{picture(IMPORTS, TABLE)}```", TEXT)
    PAGE.write_text(drawn, encoding="utf-8")
