import gzip
import json
from pathlib import Path

import pytest

from fledge.judges.coherence import CoherenceJudge
from fledge.sources.tinystories_instruct import END, parse_record

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def yardsticks() -> list[dict]:
    return [json.loads(line) for line in (HERE / "yardsticks.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tales(yardsticks) -> list[str]:
    """A thousand shipped tales that no reader labelled."""
    with gzip.open(HERE.parents[1] / "examples/tales.txt.gz", "rt", encoding="utf-8") as file:
        stories = [parse_record("\n" + part).get("Story", "") for part in file.read().split(END)]
    read = {row["story"] for row in yardsticks}
    return [story for story in stories if story.endswith(".") and story not in read][:1000]


@pytest.fixture(scope="session")
def coherence(tales) -> CoherenceJudge:
    return CoherenceJudge(tales[100:])
