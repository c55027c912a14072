"""Finds characters that a closed vocabulary cannot encode. A vocabulary is closed if it has no unknown token."""

from collections import Counter

from tokenizers import models
from transformers import PreTrainedTokenizerBase

PROBE = "\U0010fffd\u0378"  # characters that no text has
SHOWN = 20
UNWRITABLE = "the vocabulary lacks something in it"  # the reason for which a record is left out


class Spelling:
    """`missing(text)` names the characters (or words) of a text that a tokenizer does not know.

    Byte-level vocabularies and those with an unknown token encode any text; a closed one raises an error, or silently
    drops what it does not know.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.is_closed = not self._writes(PROBE)
        self.known: dict[str, bool] = {}

    def missing(self, text: str) -> list[str]:
        """The missing characters (or words) in order, each once."""
        if not self.is_closed:
            return []
        parts = sorted(set(text))
        backend = self.tokenizer.backend_tokenizer
        if isinstance(backend.model, models.WordLevel) and backend.pre_tokenizer:
            parts = sorted({part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)})
        for part in parts:
            if part not in self.known:
                self.known[part] = self._writes(part)
        return [part for part in parts if not self.known[part]]

    def _writes(self, part: str) -> bool:
        try:
            ids = self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        except Exception:  # the Rust side raises bare Exception
            return False
        return bool(ids) or part.isspace()


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that stands for text that the vocabulary lacks; `None` if there is none.

    GPT-2's unknown token is its end-of-text.
    """
    return tokenizer.unk_token_id if tokenizer.unk_token != tokenizer.eos_token else None


def named(missing: Counter) -> str:
    """Some of the missing characters for a message, the most frequent first: `'#', '['`."""
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return ", ".join(repr(part) for part, _ in missing.most_common(SHOWN)) + more
