"""The dataclasses that a script parses its keys into."""

from pkgutil import resolve_name

KEYS = {
    "train_tokenizer.py": ["fledge.scripts.train_tokenizer:TokenizerArguments"],
    "pretrain.py": ["fledge.scripts.pretrain:PretrainArguments", "fledge.pretraining.pretrainer:PretrainConfig"],
    "trim_vocabulary.py": ["fledge.scripts.trim_vocabulary:TrimArguments"],
    "convert_checkpoint.py": ["fledge.scripts.convert_checkpoint:ConvertArguments"],
    "prepare_dataset.py": ["fledge.scripts.prepare_dataset:PrepareArguments"],
    "train_sft.py": [
        "fledge.scripts.train_sft:RunArguments", "fledge.training.trainer:SmallModelConfig", "trl:ModelConfig",
    ],
    "train_grpo.py": [
        "fledge.scripts.train_grpo:GrpoArguments", "fledge.rewards.configuration:SmallGrpoConfig", "trl:ModelConfig",
    ],
    "train_dpo.py": [
        "fledge.scripts.train_dpo:DpoArguments", "fledge.rewards.preferences:SmallDpoConfig", "trl:ModelConfig",
    ],
    "evaluate_model.py": ["fledge.scripts.evaluate_model:EvaluateArguments", "fledge.sampling:Sampling"],
    "generate.py": ["fledge.scripts.generate:GenerateArguments", "fledge.sampling:Sampling"],
    "export.py": ["fledge.scripts.export:ExportArguments"],
    "publish.py": ["fledge.scripts.publish:PublishArguments"],
}  # fmt: skip


def keys_of(script: str) -> list[type]:
    return [resolve_name(name) for name in KEYS[script]]
