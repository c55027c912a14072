"""The reasons for leaving out a record or an example, and the key that changes that."""

from collections.abc import Sequence
from dataclasses import dataclass

from fledge.tokenizers.spelling import UNWRITABLE


@dataclass(frozen=True)
class Reason:
    """A reason: its `text` in the budget report, and the key that changes it, its `remedy`, if it was not asked for."""

    text: str
    remedy: str | None = "another --task"
    of_examples: bool = False

    def __str__(self) -> str:
        return self.text


ANSWER_LOST = Reason(
    "its answer was cut away with the text", "a longer --max_length, or a base with a longer context,", True
)
HELD_OUT = Reason("its topic or story is held out in another split", "--split", True)
DUPLICATE = Reason("an exact duplicate", "other --data", True)
MORE_ANSWERS = "asking for more answers to each prompt (evaluate_model.py --num_samples)"
TIED = Reason("all answers to the prompt are worth the same", f"{MORE_ANSWERS} or a smaller --margin")
NONE_STOPPED = Reason("no answer to the prompt ended by itself", MORE_ANSWERS)
NONE_IS_DONE = Reason("no answer did what the prompt asks", MORE_ANSWERS)
ONE_ANSWER = Reason("there is one answer to the prompt", MORE_ANSWERS)
OF_ANSWERS = (TIED, NONE_STOPPED, NONE_IS_DONE, ONE_ANSWER)
NEAR_DUPLICATE = Reason("a near duplicate", "--near_duplicates", True)


def too_long(max_length: int) -> Reason:
    """The reason for an over-long example. Its remedies are counted, and the budget report names them."""
    return Reason(f"longer than {max_length} tokens", of_examples=True)


def surplus(column: str) -> Reason:
    return Reason(f"surplus of one {column}", "--balance", True)


def unmet(only: Sequence[str]) -> Reason:
    """The reason for an example that does not meet the conditions of `--only`."""
    return Reason(f"not {' and '.join(only)}", None, True)


def unwritable(lacking: str = "") -> Reason:
    """The reason for an example that the vocabulary cannot write; `lacking` names characters, once all are known."""
    return Reason(f"{UNWRITABLE}: {lacking}" if lacking else UNWRITABLE, "a base with a larger vocabulary", True)
