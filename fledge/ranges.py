"""The allowed ranges of numeric keys: declared in a table beside the keys, and checked right after parsing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fledge.errors import UserError

LARGEST = 2**63  # integers beyond this overflow in every library


@dataclass(frozen=True)
class Range:
    """From `at_least` (or above `above`) up to `at_most` (or below `below`); `besides` is one more allowed number."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    besides: float | None = None

    def __contains__(self, value: float) -> bool:
        return value == self.besides or (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        said = " and ".join(f"{words} {end:,}" for words, end in ends.items() if end is not None)
        return said + (f", or {self.besides}" if self.besides is not None else "")


AT_LEAST_ONE = Range(at_least=1)
NOT_NEGATIVE = Range(at_least=0)
POSITIVE = Range(above=0)
SEED = Range(at_least=0, below=2**32)  # NumPy's range


def check_ranges(arguments: object, ranges: Mapping[str, Range]) -> None:
    """Checks every number in a dataclass. A key that is not in `ranges` only has to be finite.

    Raises:
        UserError: a number is NaN, infinite or out of its range.
    """
    for key, value in vars(arguments).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if key in ranges and value not in ranges[key]:
            raise UserError(f"--{key} {value} is out of range; it must be {ranges[key]}.")
        if not math.isfinite(value) or abs(value) >= LARGEST:
            raise UserError(f"--{key} {value} is no number to work with; give a finite one.")
