"""How answers are sampled: the keys that generate.py and evaluate_model.py share."""

from dataclasses import dataclass, field
from typing import ClassVar

from fledge.ranges import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SEED, Range, check_ranges

RANGES = {
    "max_new_tokens": AT_LEAST_ONE,
    "temperature": NOT_NEGATIVE,
    "top_k": NOT_NEGATIVE,
    "top_p": Range(above=0, at_most=1),
    "repetition_penalty": POSITIVE,
    "seed": SEED,
}


@dataclass
class Sampling:
    """The sampling keys. Nothing heavy is imported here, so that `--help` answers at once."""

    GROUPS: ClassVar = {"max_new_tokens": "sampling"}

    max_new_tokens: int = field(default=300, metadata={"help": "longest answer in tokens (default 300)"})
    temperature: float = field(default=0.8, metadata={"help": "0 always takes the most likely token (default 0.8)"})
    top_k: int = field(default=0, metadata={"help": "sample from the k most likely tokens; 0: from all (default 0)"})
    top_p: float = field(default=0.95, metadata={"help": "sample from the most likely that sum to p (default 0.95)"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "above 1: avoid tokens already there (default 1)"})
    seed: int = field(default=0, metadata={"help": "the same seed gives the same answers (default 0)"})

    def check(self) -> None:
        """Checks every value against its range.

        Raises:
            UserError: a value outside its range.
        """
        check_ranges(self, RANGES)

    def decoding(self) -> dict[str, bool | float]:
        """The same sampling as keys of transformers' `GenerationConfig`.

        Every key is set, `top_k` too: transformers uses 50 for a missing one.
        """
        if self.temperature == 0:
            return {"do_sample": False, "repetition_penalty": self.repetition_penalty}
        keys = ("temperature", "top_k", "top_p", "repetition_penalty")
        return {"do_sample": True} | {key: getattr(self, key) for key in keys}
