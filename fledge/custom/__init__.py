"""One model class for what no architecture of transformers holds; its files are saved beside the weights.

The class is registered with transformers, so Fledge opens such a folder with its own copy and never runs a folder's
files. Outside of Fledge they do run, for those who pass `trust_remote_code=True`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from fledge.custom.configuration_fledge_gpt import FledgeGPTConfig
from fledge.custom.modeling_fledge_gpt import FledgeGPTForCausalLM
from fledge.errors import UserError

__all__ = ["FILES", "FledgeGPTConfig", "check_custom_code", "hashes", "open_as_strangers_do"]

FILES = tuple(Path(__file__).with_name(f"{part}_fledge_gpt.py") for part in ("configuration", "modeling"))

AutoConfig.register(FledgeGPTConfig.model_type, FledgeGPTConfig)
AutoModelForCausalLM.register(FledgeGPTConfig, FledgeGPTForCausalLM)
# Saving such a model then brings the files along, and names them in config.json.
FledgeGPTConfig.register_for_auto_class()
FledgeGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def check_custom_code(folder: Path, name: str | Path | None = None) -> bool:
    """Whether a model's folder has code of its own, which must be the same as Fledge's, byte for byte.

    Raises:
        UserError: it is other code.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = sorted({entry.split(".")[0] + ".py" for entry in config["auto_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # nothing to run; whoever opens the folder tells what is wrong with it
    name = name or folder
    if config.get("model_type") != FledgeGPTConfig.model_type or files != [file.name for file in FILES]:
        raise UserError(
            f"{name} needs code of its own ({', '.join(files)}), and Fledge runs none that it did not write; give it a "
            "checkpoint and convert_checkpoint.py --allow_custom_code, or a model of an architecture of transformers."
        )
    for file in FILES:
        if not (folder / file.name).is_file() or (folder / file.name).read_bytes() != file.read_bytes():
            raise UserError(
                f"{name}/{file.name} is not the file that this version of Fledge writes, and no other is run; convert "
                "the checkpoint again, or use the version that wrote it."
            )
    return True


def hashes() -> dict[str, str]:
    """The SHA-256 of each file, for the record of a conversion."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in FILES}


def open_as_strangers_do(folder: Path) -> PreTrainedModel:
    """Opens a model with the code in its folder, as `trust_remote_code=True` does, in float32."""
    cls: Any = get_class_from_dynamic_module(f"{FILES[1].stem}.{FledgeGPTForCausalLM.__name__}", str(folder))
    return cls.from_pretrained(folder, dtype="float32", local_files_only=True)
