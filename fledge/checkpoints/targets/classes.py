"""The classes of transformers that a checkpoint is converted to."""

from fledge.checkpoints.targets import experts, gpt, llama
from fledge.checkpoints.targets.target import Target

TARGETS: dict[str, Target] = {
    "gpt2": gpt.GPT2,
    "stablelm": llama.STABLELM,
    "llama": llama.LLAMA,
    "opt": gpt.OPT,
    "starcoder2": llama.STARCODER2,
    "arcee": llama.ARCEE,
    "mistral": llama.MISTRAL,
    "qwen3": llama.QWEN3,
    "nanochat": llama.NANOCHAT,
    "gpt_neox": gpt.GPT_NEOX,
    "mpt": gpt.MPT,
    "gemma2": llama.GEMMA2,
    "olmo2": llama.OLMO2,
    "mixtral": experts.MIXTRAL,
    "qwen3_moe": experts.QWEN3_MOE,
    "qwen2_moe": experts.QWEN2_MOE,
    "gpt_neo": gpt.GPT_NEO,
    "granite": llama.GRANITE,
}
"""In order of preference, the plainest class first."""
