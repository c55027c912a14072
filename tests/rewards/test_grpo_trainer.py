"""One step of GRPO against the papers' equations in float64, and what a run may be cut into without a difference."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from small import CONTEXT_LENGTH, MODELS, VOCAB_SIZE, small_gpt2, small_tokenizer
from transformers import TrainerCallback

from fledge.encoding import IGNORED
from fledge.rewards.configuration import SmallGrpoConfig
from fledge.rewards.curves import RewardProgress
from fledge.rewards.rollouts import Rollouts
from fledge.rewards.trainer import SmallGrpoTrainer, StopWhenDead
from fledge.training.lineage import Lineage, settings_of
from fledge.training.opening import open_trainer

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
LIMIT, GROUP = 9, 4
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]


def messages_of(ids: list[int]) -> list[dict[str, str]]:
    return [{"role": "user", "content": " ".join(f"t{i}" for i in ids)}]


def even(completion_ids, **_) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / LIMIT for ids in completion_ids]


class Given:
    """Rollouts that were written beforehand: of every length, most of them ended, and kept with their prompts."""

    def __init__(self):
        self.generator, self.made = torch.Generator().manual_seed(1), []

    def draw(self, low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=self.generator).tolist()

    def __call__(self, prompts, trainer):
        prompt_ids = [trainer.processing_class(messages[0]["content"])["input_ids"] for messages in prompts]
        lengths = self.draw(1, LIMIT, len(prompts))
        completions = [[*self.draw(1, VOCAB_SIZE, length), 0] for length in lengths]
        completions = [ids if i % 5 else [*(ids * LIMIT)[: LIMIT - 1], 3] for i, ids in enumerate(completions)]
        self.made.append((prompt_ids, completions))
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


class Steps(TrainerCallback):
    """The weights before each step and the gradients in it."""

    def __init__(self):
        self.before, self.gradients = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append(copy.deepcopy(model.state_dict()))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: p.grad.double() for name, p in model.named_parameters()})


def trainer_for(folder, rollouts=None, model=None, reward=even, callbacks=(), **changes) -> SmallGrpoTrainer:
    config = {
        "bf16": False, "use_cpu": True, "report_to": "none", "seed": 1, "learning_rate": 0.02, "max_grad_norm": 0.0,
        "num_generations": GROUP, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_completion_length": LIMIT, "max_steps": 4, "lr_scheduler_type": "constant",
    }  # fmt: skip
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    encoded = Dataset.from_list(
        [{"input_ids": [*ids, 3, 0], "labels": [IGNORED] * len(ids) + [3, 0]} for ids in PROMPTS]
    )
    args = SmallGrpoConfig(output_dir=str(folder), **config | changes)
    prompts = [messages_of(ids) for ids in PROMPTS]
    made = open_trainer(
        SmallGrpoTrainer,
        args,
        [Lineage(settings_of(args)), *callbacks],
        RewardProgress,
        model=model or small_gpt2(),
        prompts=prompts,
        reward_funcs=[reward],
        rollouts=rollouts or Rollouts(encoded, prompts),
        processing_class=tokenizer,
    )
    made.start_from(None)
    return made


def log_probs_of(model, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    """Of each token of an answer, from a plain forward over prompt and answer alone."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def loss_by_definition(policy, old, reference, generation, config: SmallGrpoConfig) -> torch.Tensor:
    """The objective of the papers, negated, over all answers of one step.

    GRPO is equation 3 of https://arxiv.org/abs/2402.03300 with equation 4 for the KL divergence. Dr. GRPO
    (https://arxiv.org/abs/2503.20783, section 3.2) leaves out 1/|o_i| and the standard deviation; its constant is the
    limit of the answers. DAPO is equation 8 of https://arxiv.org/abs/2503.14476, with its overlong filtering
    (section 3.4): an answer that was cut counts nothing.
    """
    rewards = torch.tensor(even(generation[1]), dtype=torch.float64).view(-1, GROUP)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if config.scale_rewards == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)  # TRL's guard against a division by 0
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    sums, lengths = [], []
    for prompt, answer, advantage in zip(*generation, advantages.flatten(), strict=True):
        if config.mask_truncated_completions and answer[-1] != 0:
            sums.append(torch.zeros((), dtype=torch.float64))
            lengths.append(0)
            continue
        new = log_probs_of(policy, prompt, answer, config.temperature)
        with torch.no_grad():
            before = log_probs_of(old, prompt, answer, config.temperature)
            start = log_probs_of(reference, prompt, answer, config.temperature)
        ratio = (new - before).exp()
        objective = torch.min(ratio * advantage, ratio.clamp(1 - config.epsilon, 1 + high) * advantage)
        distance = (start - new).exp() - (start - new) - 1
        sums.append((objective - config.beta * distance).sum())
        lengths.append(len(answer))
    total, tokens = torch.stack(sums), torch.tensor(lengths, dtype=torch.float64)
    if config.loss_type == "grpo":
        return -(total / tokens).mean()
    return -total.sum() / (tokens.sum() if config.loss_type == "dapo" else len(sums) * LIMIT)


OBJECTIVES = {
    "GRPO": {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.5, "use_bias_correction_kl": False},
    "Dr. GRPO": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "temperature": 0.7},
    "DAPO": {
        "loss_type": "dapo", "scale_rewards": "group", "beta": 0.0, "epsilon_high": 0.28,
        "mask_truncated_completions": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_of_each_step_are_those_of_the_paper(objective, tmp_path, capsys):
    given, steps = Given(), Steps()
    trainer = trainer_for(tmp_path, given, callbacks=[steps], num_iterations=2, epsilon=0.05, **OBJECTIVES[objective])
    trainer.train()
    models = [small_gpt2().double() for _ in steps.before]
    for model, weights in zip(models, steps.before, strict=True):
        model.load_state_dict(weights)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(given.made) == 2  # each generation is learned from twice
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert ["  reward " in line for line in lines] == [True, False, True, False]
    again = ["the same answers again  loss " in line and " 0 tokens/s" in line for line in lines]
    assert again == [False, True, False, True]
    assert any(entry.get("clip_ratio/region_mean", 0) > 0 for entry in trainer.state.log_history)
    for step, policy in enumerate(models):
        loss = loss_by_definition(policy, models[step // 2 * 2], models[0], given.made[step // 2], trainer.args)
        loss.backward()
        assert losses[step] == pytest.approx(loss.item(), abs=2e-5)
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(steps.gradients[step][name], parameter.grad, atol=2e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_log_probs_of_samples_are_those_of_a_plain_forward(kind, with_gradient, tmp_path, monkeypatch):
    monkeypatch.setattr("fledge.rewards.trainer.TOKENS_AT_ONCE", 20)
    trainer = trainer_for(tmp_path, model=MODELS[kind](), temperature=0.8)
    rows = [{"prompt": messages_of(PROMPTS[number % 4]), "row": number % 4} for number in [0] * 4 + [2] * 4]
    batch = trainer._generate_and_score_completions(rows)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    keep = batch["completion_ids"].shape[1]
    with torch.set_grad_enabled(with_gradient):
        found, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, keep, compute_entropy=True
        )
    assert found.requires_grad == with_gradient
    model = MODELS[kind]().double()
    for number, row in enumerate(rows):
        length = int(batch["completion_mask"][number].sum())
        prompt, answer = PROMPTS[row["row"]], batch["completion_ids"][number, :length].tolist()
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = log_probs_of(model, prompt, answer, 0.8)
        torch.testing.assert_close(found[number, :length].double(), expected, atol=1e-5, rtol=1e-5)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(entropies[number, :length].double(), entropy, atol=1e-5, rtol=1e-5)
        assert not found[number, length:].any()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_log_probs_in_bfloat16_are_as_exact_as_a_plain_forward(with_gradient, tmp_path):
    """The texts and the scored tokens are padded there; neither shows in what comes back."""
    trainer = trainer_for(tmp_path, bf16=True)
    rows = [{"prompt": messages_of(PROMPTS[number % 4]), "row": number % 4} for number in [0] * 4 + [2] * 4]
    batch = trainer._generate_and_score_completions(rows)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.set_grad_enabled(with_gradient):
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])
    assert found[0].shape == batch["completion_ids"].shape
    plain, exact, ours = [], [], []
    for number, row in enumerate(rows):
        answer = batch["completion_ids"][number, : int(batch["completion_mask"][number].sum())].tolist()
        with torch.autocast("cpu", torch.bfloat16):
            plain.append(log_probs_of(small_gpt2(), PROMPTS[row["row"]], answer, 1.0).double())
        exact.append(log_probs_of(small_gpt2().double(), PROMPTS[row["row"]], answer, 1.0))
        ours.append(found[0][number, : len(answer)].double())
        assert not found[0][number, len(answer) :].any()
    error, usual = ((torch.cat(x) - torch.cat(exact)).abs().mean() for x in (ours, plain))
    assert 0 < error < 1.5 * usual


def test_groups_of_equal_reward_give_no_gradient_and_end_the_run(tmp_path, capsys):
    steps = Steps()
    trainer = trainer_for(
        tmp_path,
        reward=lambda completion_ids, row, **_: [float(number) for number in row],
        callbacks=[steps, StopWhenDead()],
        beta=0.0,
        max_steps=9,
    )
    trainer.train()
    assert not any(gradient.any() for of_step in steps.gradients for gradient in of_step.values())
    assert trainer.state.global_step == 5
    assert "all answers to each prompt got the same reward" in capsys.readouterr().out


def test_samples_depend_on_their_place_in_the_run_alone(tmp_path):
    """Two processes of one prompt each sample what one process samples for two."""
    made = []
    for rank, prompts in ((0, [0, 2]), (0, [0]), (1, [2])):
        trainer = trainer_for(tmp_path)
        trainer._step = 6
        trainer.args.distributed_state.process_index, before = rank, trainer.args.distributed_state.process_index
        rows = [messages_of(PROMPTS[number]) for number in prompts for _ in range(GROUP)]
        made.append(trainer.rollout_func(rows, trainer)["completion_ids"])
        trainer.args.distributed_state.process_index = before
    assert made[0] == made[1] + made[2]
    assert len(set(map(tuple, made[0]))) == len(made[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.1},
        # Answers that were sampled and are not yet learned from when the checkpoint is saved.
        {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2, "beta": 0.0},
    ],
)
def test_a_run_that_goes_on_is_the_run_that_was_not_cut(changes, tmp_path):
    """Two of four prompts a step, so the order of the second and of the third epoch matters, too."""
    weights, logs = [], []
    for cut in (False, True):
        trainer = trainer_for(tmp_path / str(cut), max_steps=5, save_strategy="steps", save_steps=3, **changes)
        checkpoint = tmp_path / "False" / "checkpoint-3"
        if cut:
            trainer.start_from(str(checkpoint))
        trainer.train(resume_from_checkpoint=str(checkpoint) if cut else None)
        weights.append(trainer.model.state_dict())
        logs.append([entry["reward"] for entry in trainer.state.log_history if "reward" in entry])
    assert logs[0] == logs[1]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_the_reference_is_the_model_that_was_given(tmp_path):
    """Also where the weights on the disk are others by then, or gone."""
    small_gpt2().save_pretrained(tmp_path / "base")
    model = type(small_gpt2()).from_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    trainer = trainer_for(tmp_path / "out", model=model, max_steps=2)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-6
    start = small_gpt2().state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in trainer.ref_model.state_dict().items())


def test_answers_end_where_the_context_does(tmp_path):
    trainer = trainer_for(tmp_path, max_completion_length=10 * CONTEXT_LENGTH)
    made = trainer.rollout_func([messages_of(PROMPTS[2])] * GROUP, trainer)
    assert all(len(ids) == CONTEXT_LENGTH - len(PROMPTS[2]) or ids[-1] == 0 for ids in made["completion_ids"])


def test_rollouts_are_drawn_by_the_seed_and_without_dropout():
    model, prompts = small_gpt2(), [messages_of(ids) for ids in PROMPTS]
    model.lm_head.weight.data.mul_(40)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    labels = [[IGNORED] * len(ids) + [4, 0] for ids in PROMPTS]
    rollouts = Rollouts(Dataset.from_dict({"input_ids": [[*ids, 4, 0] for ids in PROMPTS], "labels": labels}), prompts)

    def drawn(seed: int) -> list[list[int]]:
        args = SimpleNamespace(
            generation_batch_size=4, process_index=0, rollout_batch_size=4, max_completion_length=LIMIT, seed=seed,
            temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, bf16=False,
        )  # fmt: skip
        accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        trainer = SimpleNamespace(
            args=args, model=model, accelerator=accelerator, generation=0, processing_class=small_tokenizer()
        )
        made = rollouts(prompts, trainer)
        assert made["prompt_ids"] == PROMPTS
        return made["completion_ids"]

    served = drawn(1)
    model.train()
    assert drawn(1) == served != drawn(2)
    assert model.training
