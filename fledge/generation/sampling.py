"""How an answer is drawn: the keys that generate.py and evaluate_model.py share."""

from dataclasses import dataclass, field

from fledge.cli import UserError


@dataclass
class Sampling:
    """Nothing heavy is imported here, so that `--help` answers at once."""

    max_new_tokens: int = field(default=300, metadata={"help": "longest answer in tokens (default 300)"})
    temperature: float = field(default=0.8, metadata={"help": "0 always takes the likeliest token (default 0.8)"})
    top_k: int = field(default=0, metadata={"help": "draw from the k likeliest tokens; 0: from all (default 0)"})
    top_p: float = field(default=0.95, metadata={"help": "draw from the likeliest that sum to p (default 0.95)"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "above 1: avoid tokens already there (default 1)"})
    seed: int = field(default=0, metadata={"help": "the same seed gives the same answers (default 0)"})

    def check(self) -> None:
        """Raises:
        UserError: a value outside its range.
        """
        ranges = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, in_range in ranges.items():
            if not in_range:
                raise UserError(f"--{name} {getattr(self, name)} is out of range; --help says what it means.")
