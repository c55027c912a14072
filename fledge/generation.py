"""Answers from a model: prompts through its own template, batched, seeded, never past its context."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from fledge.cli import UserError
from fledge.sampling import Sampling
from fledge.tokenizers import open_tokenizer


@dataclass
class Answer:
    """`stopped` says that the model ended by itself, with its end-of-text token, rather than at a limit."""

    text: str
    tokens: int
    stopped: bool


def load_model(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Opens a model folder in float32 on the best device there is.

    Raises:
        UserError: the folder holds no model.
    """
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"There is no model at {folder}: it has no config.json.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    accelerator = torch.accelerator.current_accelerator()
    return model.to(accelerator or "cpu").eval(), open_tokenizer(folder)


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    seed: int,
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    """Continues prompts of token ids together, padded on the left, which is the only side generation gets right.

    Raises:
        UserError: a prompt leaves no room for an answer in the model's context.
    """
    context, longest = model.config.max_position_embeddings, max(map(len, prompts))
    if longest >= context:
        raise UserError(f"A prompt of {longest} tokens leaves no room in the model's context of {context}; shorten it.")
    end = tokenizer.eos_token_id
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # masked, so that any token does
    input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"top_k": sampling.top_k, "top_p": sampling.top_p, "temperature": sampling.temperature}
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        streamer=streamer,
        generation_config=GenerationConfig(
            max_new_tokens=min(sampling.max_new_tokens, context - longest),
            do_sample=sampling.temperature > 0,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=end,
            pad_token_id=pad,
            **(settings if sampling.temperature > 0 else {}),
        ),
    )
    answers = []
    for ids in output[:, longest:].tolist():
        stopped = end in ids
        ids = ids[: ids.index(end)] if stopped else ids
        answers.append(Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) + stopped, stopped))
    return answers


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int], None],
) -> list[Answer]:
    """Continues any number of prompts, those of like length together; `progress` is told how many are done."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        made = answer_batch(model, tokenizer, [prompts[i] for i in batch], sampling, sampling.seed + begin)
        answers.update(zip(batch, made, strict=True))
        progress(len(answers))
    return [answers[i] for i in range(len(prompts))]
