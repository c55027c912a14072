"""Trains, saves and measures a byte-level BPE (Radford et al. 2019, section 2.2).

It can encode every text, and decoding restores the text exactly.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fledge.errors import UserError
from fledge.tokenizers import gpt2, load_tokenizer

HOLD_OUT_EVERY, HOLD_OUT_BYTES = 20, 4_000_000
NO_LIMIT = int(1e30)  # transformers' own value for a tokenizer that knows no context length


class HeldOut:
    """Yields text for training, and holds out every twentieth piece for the report, up to four million bytes.

    If the corpus has fewer pieces, all of it is used for training, and `text` is its beginning.
    """

    def __init__(self, pieces: Iterable[tuple[str, bool]]):
        self.pieces = pieces
        self.documents = self.bytes = 0
        self.text: list[str] = []
        self.is_unseen = False

    def __iter__(self) -> Iterator[str]:
        held = 0
        for number, (text, ends) in enumerate(self.pieces, 1):
            size = len(text.encode())
            self.documents += ends
            self.bytes += size
            if number == 1:
                self.text = [text[:HOLD_OUT_BYTES]]
            if number % HOLD_OUT_EVERY or held + size > HOLD_OUT_BYTES:
                yield text
                continue
            self.text = [*(self.text if self.is_unseen else []), text]
            self.is_unseen = True
            held += size


def train(texts: Iterable[str], vocab_size: int, special_tokens: list[str], min_frequency: int) -> Tokenizer:
    """Trains a byte-level BPE.

    Raises:
        UserError: the text has too few pairs for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise UserError(
            f"The text supports {found:,} tokens with --min_frequency {min_frequency}, and --vocab_size asks for "
            f"{vocab_size:,}; ask for fewer or give more text."
        )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a `PreTrainedTokenizerFast` with `<|endoftext|>` as the beginning, end and padding token."""
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    load_tokenizer(str(file), NO_LIMIT).save_pretrained(folder)


def measure_tokenizer(tokenizer: Tokenizer, held_out: HeldOut) -> dict:
    """Measures the tokenizer on held-out text, and GPT-2's on the same text if it is installed."""
    size = sum(len(text.encode()) for text in held_out.text)
    encoded = [tokenizer.encode(text).ids for text in held_out.text]
    used = {i for ids in encoded for i in ids}
    vocabulary = tokenizer.get_vocab()
    learnt = set(vocabulary.values()) - set(tokenizer.get_added_tokens_decoder())
    # A token of some bytes of a character is no text by itself.
    readable = (text for text in (tokenizer.decode([i]) for i in learnt) if "\ufffd" not in text)
    longest = sorted(readable, key=lambda token: (-len(token), token))
    try:
        other = gpt2()
        gpt2_tokens = sum(len(other.encode(text).ids) for text in held_out.text)
    except UserError:
        gpt2_tokens = None  # neither the wheel nor a network
    return {
        "vocab_size": len(vocabulary),
        "report_on": "held out" if held_out.is_unseen else "of the training text",
        "report_bytes": size,
        "bytes_per_token": size / sum(map(len, encoded)),
        "gpt2_bytes_per_token": size / gpt2_tokens if gpt2_tokens else None,
        "vocabulary_used": len(used) / len(vocabulary),
        "longest_tokens": longest[:20],
    }
