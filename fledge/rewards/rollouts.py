"""Samples answers to train on with Fledge's own loop. Each answer has its own random stream."""

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fledge.cpu import multiplies_bf16
from fledge.encoding import prompt_length
from fledge.generation.answers import continue_each
from fledge.messages import Messages
from fledge.sampling import Sampling
from fledge.training.attention import by_sdpa
from fledge.training.trainable import merged, without_adapter

if TYPE_CHECKING:
    from datasets import Dataset


class Rollouts:
    """A `rollout_func` of TRL: answers to prompts of the rows of an encoded training split.

    An answer depends only on the seed, on its place among all answers of the run, and on the weights. So a resumed run
    samples the same answers as an uninterrupted one, and so do two processes in place of one (up to rounding in
    bfloat16, where a batch has more or fewer rows).
    """

    def __init__(self, rows: "Dataset", prompts: list[Messages]):
        # A prompt that was shortened in preparation has fewer ids than its messages.
        self.ids = {
            json.dumps(messages): ids[: prompt_length(labels)]
            for messages, ids, labels in zip(prompts, rows["input_ids"], rows["labels"], strict=True)
        }

    def __call__(self, prompts: list[Messages], trainer: Any) -> dict[str, Any]:
        """The token ids of prompts and answers, as TRL wants them from the rollouts of a `SmallGrpoTrainer`."""
        config, model = trainer.args, without_adapter(trainer.accelerator.unwrap_model(trainer.model))
        prompt_ids = [self.ids[json.dumps(messages)] for messages in prompts]
        first = trainer.generation * config.generation_batch_size + config.process_index * len(prompts)
        numbers = list(range(first, first + len(prompts)))
        sampling = Sampling(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            seed=config.seed,
        )
        training = model.training
        model.eval()  # without dropout, as in inference
        end = trainer.processing_class.eos_token_id
        # In bfloat16 answers are drawn from the probabilities that the loss computes. All rows are read up to one
        # length there, so a batch with prompts of similar length ends before the next one begins.
        in_bf16 = config.bf16 and model.device.type == "cpu" and multiplies_bf16()
        size = config.rollout_batch_size or (96 if in_bf16 else 64)
        order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
        made: dict[int, list[int]] = {}
        with by_sdpa(model), merged(model) if in_bf16 else nullcontext(), torch.autocast("cpu", enabled=in_bf16):
            for part in [order[i : i + size] for i in range(0, len(order), size)] if in_bf16 else [order]:
                asked = [prompt_ids[i] for i in part]
                made.update(continue_each(model, end, asked, sampling, size, [numbers[i] for i in part]))
        model.train(training)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [made[number] for number in numbers],
            "logprobs": None,
        }
