"""GRPO for small models: TRL's trainer with Fledge's sampling and a loss on the sampled tokens only."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOTrainer, SyncRefModelCallback
from typing_extensions import override

from fledge.encoding import IGNORED
from fledge.guards import borrow, check_overrides, missing
from fledge.memory import empty_memory, keep_freed_memory, return_freed_memory
from fledge.messages import Messages
from fledge.rewards.configuration import SmallGrpoConfig, why_not
from fledge.rewards.rollouts import Rollouts
from fledge.rewards.watch import record_of
from fledge.training.checked import CheckedTrainer
from fledge.training.configuration import with_values
from fledge.training.loss import PADDED
from fledge.training.resuming import tokens_seen
from fledge.training.sharding import told_to_shard
from fledge.training.trainer import score_faster

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # Fledge checks that `rollout_func` is there
TOKENS_AT_ONCE = 8192  # of a forward pass without gradients
GROWING = 4 << 20  # bytes of a buffer that grows, and more than what comes and goes at every token
DEAD_STEPS = 5


@check_overrides
class SmallGrpoTrainer(CheckedTrainer, GRPOTrainer):
    """TRL's `GRPOTrainer` that samples with Fledge's loop and scores only the sampled tokens.

    The objective is TRL's; three things are computed differently. TRL pads prompts on the left, which needs a mask;
    here prompt and answer are contiguous, with padding on the right, which causal attention never reads. The
    micro-batches of a step have answers of similar length. The reference is a copy of the given model, not loaded from
    disk.
    """

    args: SmallGrpoConfig

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: SmallGrpoConfig,
        prompts: list[Messages],
        rollouts: Rollouts,
        processing_class: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
        **inputs: Any,
    ):
        copied = args.beta != 0 and peft_config is None and not told_to_shard(args)
        reference = copy.deepcopy(model).requires_grad_(False) if copied else None
        why = why_not(args)
        if not why:
            inputs["rollout_func"] = rollouts
        without = with_values(args, beta=0.0, sync_ref_model=False) if copied else args
        tokenizer = copy.deepcopy(processing_class)
        tokenizer.padding_side = "left"  # TRL's own generation needs it
        super().__init__(
            model=model,
            args=without,
            peft_config=peft_config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": prompt, "row": row} for row, prompt in enumerate(prompts)]),
            **inputs,
        )
        for name in ("_step", "_buffered_inputs"):
            if name not in vars(self):
                raise missing("trl", f"GRPOTrainer.{name}")
        self.args.beta, self.args.sync_ref_model, self.beta = args.beta, args.sync_ref_model, args.beta
        self.sampling_line = f"Answers: by TRL's generation, because {why}" if why else "Answers: by Fledge's own loop"
        self.loss_line = self.prepare(self.accelerator.unwrap_model(self.model), rows=2)
        if reference is not None:
            add_fused_lm_head = borrow("trl.trainer.utils", "add_fused_lm_head")
            add_fused_lm_head(reference, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
            self.prepare(reference, rows=1)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
            if args.sync_ref_model:
                self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    def prepare(self, model: nn.Module, rows: int) -> str:
        """Makes `model` score only sampled positions, if that is faster; returns a line that says so."""
        if self.args.cast_lm_head_to_fp32 or self.args.entropy_coef or self.args.use_adaptive_entropy:
            return "Loss: TRL's head, which alone has the entropy's gradient and casts itself to float32"
        return score_faster(model, self.args, self.args.temperature, rows, self.few_shapes)

    @property
    def few_shapes(self) -> bool:
        """Whether oneDNN multiplies, which makes a kernel for each shape and keeps it (`score_supervised_only`)."""
        return bool(self.args.bf16) and self.args.device.type == "cpu"

    @property
    def generation(self) -> int:
        """How many times the run has sampled answers so far."""
        return self._step // self.steps_of_a_generation

    @property
    def steps_of_a_generation(self) -> int:
        """The number of micro-batches between two samplings."""
        assert self.args.steps_per_generation
        return self.args.steps_per_generation * self.num_iterations

    # ------------------------------------------------------------ Data
    @override
    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        """TRL's sampler with an order that depends only on the seed and the epoch, also in a resumed run."""
        sampler: Any = super()._get_train_sampler(dataset)
        if self.args.shuffle_dataset:
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
        return sampler

    @override
    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        sampling = self._step % self.steps_of_a_generation == 0
        on_cpu = self.args.device.type == "cpu"
        if sampling:  # it and the loss keep what they free, and neither can use all that the other has kept
            empty_memory()
        if sampling and on_cpu:  # buffers of keys and values grow, and leave gaps in which the next ones do not fit
            return_freed_memory(GROWING)
        inputs = super()._prepare_inputs(generation_batch)
        if sampling and on_cpu:
            keep_freed_memory()
        if sampling:
            empty_memory()
        # Where a micro-batch is weighted by its own tokens, its rows stay as they were drawn.
        if not self.model.training or self._buffered_inputs is before or self.loss_type == "bnpo":
            return inputs
        size = self.args.gradient_accumulation_steps
        parts = self._buffered_inputs
        self._buffered_inputs = [
            sorted_part
            for begin in range(0, len(parts), size)
            for sorted_part in by_length(parts[begin : begin + size])
        ]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # ------------------------------------------------------------ Loss
    @override
    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies (B, C) of the last `logits_to_keep` = C positions of `input_ids` (B, P + C).

        Tokens that `attention_mask` excludes are neither read nor scored; their scores are 0.
        """
        if compute_aux_loss or any(value is not None for value in inputs.values()):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **inputs,
            )
        read = attention_mask.bool()
        order, batches = torch.arange(len(read)), [len(read)]
        if not torch.is_grad_enabled():
            order, batches = in_batches(read.sum(1).cpu(), self.args.train_batch_size if self.few_shapes else None)
        log_probs, entropies = [], []
        for rows in order.split(batches):
            scored = read[rows, -logits_to_keep:]
            with self.accelerator.autocast():
                texts = on_the_right(input_ids[rows], read[rows], logits_to_keep, PADDED if self.few_shapes else 1)
                found = model(**texts, fused_lm_head=True)
            log_probs.append(scores_of(found.log_probs, found.label_mask, scored))
            if compute_entropy:
                entropies.append(scores_of(found.entropy, found.label_mask, scored))
        back = order.argsort()
        return torch.cat(log_probs)[back], torch.cat(entropies)[back] if compute_entropy else None, None

    # ------------------------------------------------------------ Stopping and going on
    @override
    def tokens_so_far(self) -> int:
        return self.state.num_input_tokens_seen

    @override
    def start_from(self, checkpoint: str | None) -> None:
        """Restores the count of steps, and answers that were sampled but not yet trained on."""
        self.state.num_input_tokens_seen = tokens_seen(checkpoint)
        file = Path(checkpoint or "") / self.rollouts_file
        if checkpoint and file.exists():
            saved = torch.load(file, weights_only=True)
            self._step, self._buffered_inputs = saved["step"], saved["answers"]

    @property
    def rollouts_file(self) -> str:
        return f"rollouts_{self.args.process_index}.pt"

    @override
    def save_process_state(self, folder: Path) -> None:
        in_use = self._step % self.steps_of_a_generation != 0
        torch.save(
            {"step": self._step, "answers": self._buffered_inputs if in_use else None}, folder / self.rollouts_file
        )

    @override
    def excerpt_of(self, inputs: Any) -> str:
        return inputs[0]["prompt"][-1]["content"]

    @override
    def extra_record(self) -> dict:
        """The rewards by name, at the first and the last logged step that has them, and what the watch kept."""
        keys = {"reward": "reward"} | {name: f"rewards/{name}/mean" for name in self.reward_func_names}
        # A reward is None in steps without a prompt that calls for it.
        ways = {name: [e[key] for e in self.state.log_history if e.get(key) is not None] for name, key in keys.items()}
        rewards = {name: [values[0], values[-1]] for name, values in ways.items() if values}
        return {"rewards": rewards} | record_of(self.state.log_history)

    @override
    def summary_lines(self, record: dict) -> list[str]:
        ways = [f"{name} {first:.2f} to {last:.2f}" for name, (first, last) in record["rewards"].items()]
        return [f"Rewards of the samples: {', '.join(ways)}."]


def by_length(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of one step with all answers sorted by length, longest first.

    Values are tensors with a row for each answer, or one number for all.
    """
    whole = {key: torch.cat([part[key] for part in parts]) if value.ndim else value for key, value in parts[0].items()}
    order = (whole["prompt_mask"].sum(1) + whole["completion_mask"].sum(1)).argsort(descending=True, stable=True)
    split = {key: value[order].split(len(parts[0]["advantages"])) for key, value in whole.items() if value.ndim}
    return [
        {key: split[key][number] if value.ndim else value for key, value in whole.items()}
        for number in range(len(parts))
    ]


def in_batches(lengths: Tensor, most: int | None = None) -> tuple[Tensor, list[int]]:
    """An order of rows of `lengths` (B,) by length, and batch sizes: `most` rows, or a limited number of tokens."""
    order = lengths.argsort(descending=True, stable=True)
    sizes, left = [], lengths[order].tolist()
    while left:
        sizes.append(min(len(left), most or max(1, TOKENS_AT_ONCE // left[0])))
        left = left[sizes[-1] :]
    return order, sizes


def on_the_right(input_ids: Tensor, read: Tensor, completion: int, multiple: int = 1) -> dict[str, Tensor]:
    """`input_ids` (B, P + C) with only the tokens to `read`, padded on the right; labels for the last C positions.

    Their length is a `multiple`, or P + C if that is less.
    """
    ids = pad_sequence([row[kept] for row, kept in zip(input_ids, read, strict=True)], batch_first=True)
    ids = F.pad(ids, (0, min(-ids.shape[1] % multiple, input_ids.shape[1] - ids.shape[1])))
    places = torch.arange(ids.shape[1], device=ids.device)
    prompt, whole = read[:, :-completion].sum(1, keepdim=True), read.sum(1, keepdim=True)
    return {"input_ids": ids, "labels": ids.masked_fill((places < prompt) | (places >= whole), IGNORED)}


def scores_of(found: Tensor, is_scored: Tensor, wanted: Tensor) -> Tensor:
    """The scores (B, T) of the tokens in `is_scored`, moved in order to the positions in `wanted` (B, C)."""
    return found.new_zeros(wanted.shape).masked_scatter(wanted, found[is_scored])


@check_overrides
class StopWhenDead(TrainerCallback):
    """Ends a run if all answers to each prompt have had equal rewards for some steps: nothing is learned."""

    dead = 0

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "frac_reward_zero_std" not in logs:
            return
        self.dead = self.dead + 1 if logs["frac_reward_zero_std"] == 1 else 0
        if self.dead < DEAD_STEPS:
            return
        control.should_training_stop = True
        if state.is_world_process_zero:
            print(
                f"Stopped at step {state.global_step}: in {DEAD_STEPS} steps all answers to each prompt got the same "
                "reward, so there is nothing to learn; raise --temperature or --num_generations, or give --rewards "
                "that the model earns sometimes.",
                flush=True,
            )
