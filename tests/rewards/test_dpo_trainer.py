"""DPO's loss and gradient against their definition, and what the trainer is given."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from small import MODELS, VOCAB_SIZE, random_rows, small_gpt2, small_tokenizer

from fledge.encoding import prompt_length
from fledge.errors import UserError
from fledge.rewards.preferences import PreferenceTrainer, SmallDpoConfig, save_preference_curve
from fledge.training import trial
from fledge.training.opening import open_trainer

BETA = 0.3


def random_pairs(count: int = 12) -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    pairs = []
    for row in random_rows(count):
        prompt = prompt_length(row["labels"])
        length = int(torch.randint(1, 40 - prompt, (1,), generator=generator))
        pairs.append(row | {"rejected_ids": torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist()})
    return pairs


def trainer_for(model, folder: Path, pairs: list[dict], adapter: LoraConfig | None = None, **changes):
    config = {"bf16": False, "use_cpu": True, "eval_strategy": "no", "report_to": "none", "beta": BETA} | changes
    return open_trainer(
        PreferenceTrainer,
        SmallDpoConfig(output_dir=str(folder), **config),
        [],
        model=model,
        train_dataset=Dataset.from_list(pairs),
        processing_class=small_tokenizer(),
        peft_config=adapter,
    )


def log_prob(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log π(answer | prompt), one sequence at a time and without padding."""
    log_probs = F.log_softmax(model(input_ids=torch.tensor([prompt + answer])).logits[0, :-1], -1)
    return log_probs.gather(1, torch.tensor(prompt + answer)[1:, None])[len(prompt) - 1 :].sum()


def loss_by_definition(policy, reference, pairs: list[dict]) -> torch.Tensor:
    """Equation 7 of Rafailov et al. 2023 (arXiv:2305.18290)."""
    losses = []
    for row in pairs:
        begin = prompt_length(row["labels"])
        prompt, chosen, rejected = row["input_ids"][:begin], row["input_ids"][begin:], row["rejected_ids"]
        gains = [log_prob(policy, prompt, y) - log_prob(reference, prompt, y).detach() for y in (chosen, rejected)]
        losses.append(-torch.log(torch.sigmoid(BETA * (gains[0] - gains[1]))))
    return torch.stack(losses).mean()


def exactly(model):
    """A copy in float64 with the forward of its class, without the head that scores answers."""
    exact = copy.deepcopy(model).double()
    del exact.forward
    return exact


def shaken(model) -> None:
    """Moves what trains away from the reference."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precomputed", [True, False])
def test_loss_and_gradient_are_those_of_the_definition(tmp_path, name, precomputed):
    model, pairs = MODELS[name](), random_pairs()
    reference = copy.deepcopy(model).double()
    trainer = trainer_for(model, tmp_path, pairs, precompute_ref_log_probs=precomputed)
    assert (trainer.ref_model is None) == precomputed
    batch = trainer.data_collator(list(trainer.train_dataset))
    first = trainer.compute_loss(model, batch)
    assert first.item() == pytest.approx(0.6931472, abs=1e-5)  # log 2 at the start
    shaken(model)
    exact = exactly(model)
    model.zero_grad()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    expected = loss_by_definition(exact, reference, pairs)
    expected.backward()
    assert abs(expected.item() - 0.6931472) > 0.01
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for (which, found), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, atol=2e-5, rtol=1e-4, msg=which)


def test_the_reference_of_an_adapter_is_the_model_without_it(tmp_path):
    model, pairs = small_gpt2(), random_pairs()
    reference = copy.deepcopy(model).double()
    trainer = trainer_for(model, tmp_path, pairs, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True))
    shaken(trainer.model)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    merged = exactly(trainer.model.merge_and_unload())
    assert loss.item() == pytest.approx(loss_by_definition(merged, reference, pairs).item(), abs=1e-4)


@pytest.mark.parametrize("precomputed", [True, False])
def test_what_is_left_counts_both_answers_with_their_prompts(tmp_path, monkeypatch, precomputed):
    pairs = random_pairs()
    tokens = sum(len(r["input_ids"]) + prompt_length(r["labels"]) + len(r["rejected_ids"]) for r in pairs)
    settings = {"precompute_ref_log_probs": precomputed, "num_train_epochs": 2}
    trainer = trainer_for(small_gpt2(), tmp_path, pairs, **settings)
    # All pairs are read in a millisecond.
    monkeypatch.setattr(trial, "seconds_of", lambda trainer, loss_of, repeats: loss_of().item() * 0 + 1e-3)
    monkeypatch.setattr(trial, "in_words", lambda seconds: f"{seconds:.6f}")
    for seen, left in ((0, 0.002), (tokens, 0.001)):
        told = f"Time: about {left:.6f} on this machine ({tokens * 1000:,} tokens/s in a short trial)"
        assert trainer.time_needed(seen) == told


def test_the_trainer_reads_the_ids_as_they_are_encoded(tmp_path):
    pairs = random_pairs(5)
    trainer = trainer_for(small_gpt2(), tmp_path, pairs)
    batch = trainer.data_collator(list(trainer.train_dataset))
    for number, row in enumerate(pairs):
        begin = prompt_length(row["labels"])
        for place, answer in ((number, row["input_ids"][begin:]), (number + 5, row["rejected_ids"])):
            ids = row["input_ids"][:begin] + answer
            assert batch["input_ids"][place, : len(ids)].tolist() == ids
            assert batch["completion_mask"][place].nonzero().flatten().tolist() == list(range(begin, len(ids)))
    assert trainer.train_dataset["length"] == [
        max(len(row["input_ids"]), prompt_length(row["labels"]) + len(row["rejected_ids"])) for row in pairs
    ]


def test_wpo_weights_are_those_of_trls_own_head(tmp_path, monkeypatch):
    pairs, losses = random_pairs(), []
    for own in (True, False):
        if not own:
            monkeypatch.setattr("fledge.rewards.preferences.score_faster", lambda *_, **__: "TRL's")
        model = small_gpt2()
        trainer = trainer_for(model, tmp_path, pairs, use_weighting=True)
        losses.append(trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset))).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_beta_of_zero_would_teach_nothing(tmp_path):
    with pytest.raises(UserError, match=r"--beta 0\.0 is out of range"):
        SmallDpoConfig(output_dir=str(tmp_path), beta=0.0)


def test_the_picture_has_what_was_logged(tmp_path):
    log = [{"step": 1, "loss": 0.69, "rewards/accuracies": 0.5}, {"step": 2, "eval_loss": 0.6}]
    save_preference_curve(json.loads(json.dumps(log)), tmp_path)
    assert (tmp_path / "loss_curve.png").stat().st_size > 1000
