"""Where a model lies: in a folder of this machine, or on the Hub. Torch is not imported to say that it is missing."""

import difflib
import re
import sys
from pathlib import Path

from fledge.errors import UserError

# `gpt2` or `user/name`, as transformers takes them.
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# The last is code of Fledge's own, which is compared with Fledge's copy and never run.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*_fledge_gpt.py")
# Each is asked for only if the model does not come as those before it. Torch opens the second without running code.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# The usual ones of https://huggingface.co/docs/hub/repositories-licenses; the Hub refuses what it does not know.
LICENSES = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc",
    "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "epl-2.0", "eupl-1.2", "gemma", "gfdl", "gpl",
    "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
    "llama4", "mit", "mpl-2.0", "odbl", "odc-by", "openrail", "openrail++", "other", "pddl", "unknown", "unlicense",
    "wtfpl", "zlib",
)  # fmt: skip


def find_model(name: str | Path, revision: str | None = None) -> Path:
    """The folder of the model that `name` says: itself, or the copy of what the Hub has under that id.

    Raises:
        UserError: there is neither, or what is there is no model.
    """
    folder = _folder(name) or download(str(name), revision, SMALL_FILES)
    if (folder / "adapter_config.json").exists():
        merged = folder.parent if Path(name).is_dir() and (folder.parent / "config.json").exists() else None
        raise UserError(
            f"{name} is a PEFT adapter, not a whole model; "
            + (
                f"{merged} has it merged into its base."
                if merged
                else "merge it into its base first: "
                "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)."
            )
        )
    if not (folder / "config.json").exists():
        hint = "; convert_checkpoint.py makes a model of a checkpoint" if any(folder.glob("*.pt*")) else ""
        raise UserError(f"There is no model at {name}: it has no config.json{hint}.")
    for weights in () if Path(name).is_dir() else WEIGHTS:
        if any(download(str(name), revision, (*SMALL_FILES, weights)).glob(weights)):
            break
    return folder


def find_tokenizer(name: str | Path) -> Path:
    """The folder of the tokenizer that `name` says, as in `find_model`.

    Raises:
        UserError: there is none.
    """
    folder = _folder(name, "tokenizer") or download(str(name), None, SMALL_FILES, "tokenizer")
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise UserError(f"{name} has no {TOKENIZER_FILES[0]}; convert_checkpoint.py and train_tokenizer.py write one.")
    return folder


def _folder(name: str | Path, what: str = "model") -> Path | None:
    """`name` if it is a folder, `None` if it may be an id of the Hub."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        hint = "; convert_checkpoint.py makes a model of a checkpoint" if path.suffix in (".pt", ".pth") else ""
        raise UserError(f"{name} is a file; name the folder of a {what}{hint}.")
    if not MODEL_ID.fullmatch(str(name)):
        raise UserError(f"There is no {what} at {name}: no such folder.")
    return None


def download(
    repo_id: str, revision: str | None = None, files: tuple[str, ...] | None = None, what: str = "model"
) -> Path:
    """The folder in the cache of the Hub's model `repo_id`, with those of its `files` (patterns) that exist, or all.

    Without a network the cache alone answers.

    Raises:
        UserError: the Hub has no such model, or nobody can tell.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files) if files else None))
    except errors.GatedRepoError:
        reason = "the Hub gives that model only to those who accepted its terms there and ran `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "neither is there such a folder, nor does the Hub show you such a model"
    except errors.RevisionNotFoundError:
        reason = f"the Hub's model has no revision {revision}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "there is no such folder, the Hub cannot be reached, and its cache here has no such model"
    except (errors.HTTPError, OSError, ValueError) as error:
        reason = f"there is no such folder, and the Hub answered: {' '.join(str(error).split())[:200]}"
    raise UserError(f"There is no {what} at {repo_id}: {reason}.")


def check_license(value: str) -> None:
    """Checks that `value`, given as `--license`, may be an identifier of the Hub's, and says so where one is like it.

    Raises:
        UserError: it has not the form of one.
    """
    if not LICENSE.fullmatch(value):
        raise UserError(f"--license {value} is no identifier; give one such as apache-2.0, or other.")
    like = difflib.get_close_matches(value, LICENSES, 1, 0.7)
    if value not in LICENSES and like:
        print(f"--license {value} is not among the Hub's identifiers; perhaps {like[0]} is meant.", file=sys.stderr)
