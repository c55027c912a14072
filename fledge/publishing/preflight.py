"""Checks before an upload: a published mistake is seen by everyone and kept by git."""

import re
from pathlib import Path
from typing import Any, cast

from fledge.cli import HUB_ID, read_json
from fledge.errors import UserError
from fledge.publishing.upload import files_of

TEXT = (".json", ".jsonl", ".md", ".jinja", ".py", ".txt", ".yaml", ".csv")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
# A pickle of protocol 2 to 5, and the zip in which torch.save puts one.
PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5))
# Tokens of Hugging Face, OpenAI-like services, GitHub, AWS; and private keys.
SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{32,}|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{40,}"
    r"|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
FOLDERS_OF_PEOPLE = re.compile(r"/(?:home|Users)/[\w.-]+/|[A-Z]:\\{1,2}Users\\{1,2}[\w.-]+")
GB = 10**9
LARGEST_FILE = {"model": 50 * GB, "dataset": 50 * GB, "space": 1 * GB}


def check_folder(kind: str, folder: Path) -> None:
    """Checks a repository of any kind: its card parses, and no file contains private information.

    Raises:
        UserError: a file contains a local path or a secret, is a pickle, or is too large; or the card is invalid.
    """
    for path, file in files_of(folder).items():
        if file.stat().st_size > LARGEST_FILE[kind]:
            raise UserError(
                f"{path} has {file.stat().st_size / GB:.0f} GB, more than the Hub takes in one file "
                f"({LARGEST_FILE[kind] // GB} GB for a {kind}); split it."
            )
        if file.suffix.lower() in PICKLES or is_pickle(file):
            raise UserError(f"{path} is a pickle, which runs code when it is opened; take it out or save safetensors.")
        if file.suffix.lower() in TEXT:
            check_text(path, file.read_text(encoding="utf-8"))
    check_card((folder / "README.md").read_text(encoding="utf-8"))


def is_pickle(file: Path) -> bool:
    # The first bytes of a safetensors file are a length, which may look like the beginning of a pickle.
    if file.suffix.lower() == ".safetensors":
        return False
    with file.open("rb") as content:
        start = content.read(1 << 10)
    return start.startswith(PICKLE_STARTS) or (start.startswith(b"PK\x03\x04") and b"/data.pkl" in start)


def check_text(path: str, text: str) -> None:
    """Checks that a text can be published as it is.

    Raises:
        UserError: the text holds a token or names a folder of this machine.
    """
    from huggingface_hub import get_token

    token = get_token()
    if SECRET.search(text) or (token and token in text):
        raise UserError(f"{path} holds what looks like an access token or a private key; take it out and revoke it.")
    private = {str(folder) for folder in (Path.home(), Path.cwd()) if len(folder.parts) > 1}
    found = next((folder for folder in sorted(private) if re.search(re.escape(folder) + r"(?![\w-])", text)), None)
    # Texts by people may mention any folder; records of a stage must not.
    if not found and path.endswith(".json") and not path.endswith(("tokenizer.json", "vocab.json")):
        found = (match := FOLDERS_OF_PEOPLE.search(text)) and match[0]
    if found:
        raise UserError(f"{path} names {found}, a path of this machine; publishing it would show it to everyone.")


def check_card(card: str) -> None:
    """Checks the metadata of a card, and that no value is missing.

    Raises:
        UserError: the metadata is not valid YAML, an id in it has a wrong form, or a value is missing.
    """
    import yaml
    from huggingface_hub import RepoCard

    try:
        metadata = RepoCard(card, ignore_metadata_errors=False).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"The metadata of README.md is not valid: {' '.join(str(error).split())}.") from error
    for key in ("base_model", "datasets", "models"):
        ids = metadata.get(key, [])
        for repo_id in [ids] if isinstance(ids, str) else ids:
            if not HUB_ID.fullmatch(repo_id):
                raise UserError(f"README.md names {repo_id} as {key}, which is no Hub id of the form user/name.")
    prose = re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)  # answers may contain anything
    if found := re.search(r"\b(None|nan|undefined)\b.*", prose):
        raise UserError(f"README.md says {found[0]!r}, a value that nobody gave; the run's records are incomplete.")


def check_model(folder: Path, messages: list[dict]) -> str:
    """Reloads the model with transformers alone, as users will; returns the beginning of its answer to `messages`.

    Raises:
        UserError: it does not reload, needs code that is not Fledge's, has no chat template, or computes NaN or
            infinity.
    """
    import torch
    from transformers import BatchEncoding

    from fledge.custom import check_custom_code
    from fledge.models import check_vocabulary, open_model
    from fledge.tokenizers import open_tokenizer

    check_custom_code(folder, "The model")
    if "auto_map" in read_json(folder / "tokenizer_config.json", "train_sft.py"):
        raise UserError("tokenizer_config.json names code to run (auto_map); no such tokenizer is published.")
    model, tokenizer = open_model(folder, name="The model"), open_tokenizer(folder)
    if not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template; train_sft.py saves one with the model.")
    check_vocabulary(model, tokenizer, "the model")
    form: dict[str, Any] = {"return_tensors": "pt", "return_dict": True}
    prompt = cast(BatchEncoding, tokenizer.apply_chat_template(messages, add_generation_prompt=True, **form))
    with torch.no_grad():
        if not torch.isfinite(model(**prompt).logits).all():
            raise UserError("The model computes no finite numbers; its training diverged.")
        written = cast(Any, model).generate(**prompt, do_sample=False, max_new_tokens=12)
        ids = written[0, prompt["input_ids"].shape[1] :]
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True)).strip()
