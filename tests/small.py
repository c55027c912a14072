"""Models of a few thousand parameters, rows of random tokens for them, and a trainer over the two."""

from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StableLmConfig,
    StableLmForCausalLM,
)
from trl import SFTTrainer

from fledge.encoding import IGNORED
from fledge.templates import load_template
from fledge.training.trainer import SmallModelConfig

VOCAB_SIZE, CONTEXT_LENGTH = 97, 40
BYTE_LEVEL_SIZE = 300
TEXT = "Once upon a time, there was a dog. It's 12 o'clock — naïve café! They  ran.\n\nThe end."
WITHOUT_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
LLAMA_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
}


def small_gpt2(tied: bool = True, n_layer: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    shape = {"vocab_size": VOCAB_SIZE, "n_positions": CONTEXT_LENGTH, "n_embd": 24, "n_layer": n_layer, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, **WITHOUT_DROPOUT, tie_word_embeddings=tied, eos_token_id=0))


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**LLAMA_SHAPE))


def small_stablelm() -> StableLmForCausalLM:
    torch.manual_seed(3)
    return StableLmForCausalLM(StableLmConfig(**LLAMA_SHAPE, partial_rotary_factor=0.5))


MODELS = {
    "GPT-2, tied": small_gpt2,
    "GPT-2, untied": lambda: small_gpt2(tied=False),
    "Llama": small_llama,
    "StableLM": small_stablelm,
}


def small_tokenizer(count: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Token n is the word `tn`; 0 ends a document."""
    vocabulary = Tokenizer(models.WordLevel({f"t{i}": i for i in range(count)}, unk_token="t1"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="t0", pad_token="t0")


def byte_level() -> PreTrainedTokenizerFast:
    """BPE over the bytes of `TEXT`, with a chat template; BYTE_LEVEL_SIZE leaves a model a few rows without a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=BYTE_LEVEL_SIZE - 5,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    end = "<|endoftext|>"
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)
    made.chat_template = load_template("story")
    return made


def random_rows(count: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, CONTEXT_LENGTH - 1, (1,), generator=generator))
        prompt = int(torch.randint(1, length - 1, (1,), generator=generator))
        ids = torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return made


def write_prepared(folder: Path, rows: list[dict], tokenizer: PreTrainedTokenizerFast) -> None:
    """What prepare_dataset.py leaves, as far as training reads it."""
    splits = DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows[:4]))
    splits.save_to_disk(folder / "tokenized")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "budget.json").write_text("{}", encoding="utf-8")


def trainer_for(model, folder: Path, rows: list[dict] | None = None, peft_config=None, **changes) -> SFTTrainer:
    """TRL's trainer as it is: nothing of Fledge's but the defaults of its configuration."""
    config = {"bf16": False, "eval_strategy": "no", "per_device_train_batch_size": 4, "seed": 1, "report_to": "none"}
    return SFTTrainer(
        model=model,
        args=SmallModelConfig(output_dir=str(folder), **config | changes),
        train_dataset=Dataset.from_list(rows or random_rows()),
        processing_class=small_tokenizer(),
        peft_config=peft_config,
    )
