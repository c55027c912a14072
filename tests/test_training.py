import copy
import json

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTTrainer

from fledge.cli import UserError
from fledge.encoding import IGNORED
from fledge.training import (
    SmallModelConfig,
    check_fit,
    choose_bf16,
    save_loss_curve,
    score_supervised_only,
    use_all_threads,
)


def small_gpt2(tied: bool) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    sizes = {"vocab_size": 97, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, tie_word_embeddings=tied, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, eos_token_id=0)
    )


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
        )
    )


MODELS = {"tied": lambda: small_gpt2(True), "untied": lambda: small_gpt2(False), "llama": small_llama}


def rows(count: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, 39, (1,), generator=generator))
        prompt = int(torch.randint(1, length - 1, (1,), generator=generator))
        ids = torch.randint(1, 97, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return made


def trainer_for(model, tmp_path, tiny, **changes) -> SFTTrainer:
    config = SmallModelConfig(
        output_dir=str(tmp_path), bf16=False, eval_strategy="no", per_device_train_batch_size=4, seed=1, **changes
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.base)
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer)


def batch_of(trainer: SFTTrainer) -> dict:
    return dict(next(iter(trainer.get_train_dataloader())))


def gradients(trainer: SFTTrainer, batch: dict) -> tuple[float, dict]:
    model = trainer.model
    model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_equal_trl_and_the_definition(kind, tmp_path, tiny):
    plain = trainer_for(MODELS[kind](), tmp_path / "a", tiny)
    fast = trainer_for(MODELS[kind](), tmp_path / "b", tiny)
    score_supervised_only(fast.model)
    batch = batch_of(plain)
    expected_loss, expected = gradients(plain, batch)
    loss, found = gradients(fast, batch)

    logits = MODELS[kind]()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    by_hand = F.cross_entropy(logits[:, :-1].reshape(-1, 97), batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORED)
    assert loss == pytest.approx(by_hand.item(), abs=1e-5)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def losses_of_training(trainer: SFTTrainer) -> list[float]:
    losses, compute_loss = [], trainer.compute_loss

    def recording(*arguments, **keywords):
        loss = compute_loss(*arguments, **keywords)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = recording
    trainer.train()
    return losses


def test_fifty_steps_equal_trl(tmp_path, tiny):
    plain = trainer_for(small_gpt2(True), tmp_path / "a", tiny, max_steps=50)
    expected = losses_of_training(plain)
    fast = trainer_for(small_gpt2(True), tmp_path / "b", tiny, max_steps=50)
    score_supervised_only(fast.model)
    found = losses_of_training(fast)
    assert len(found) == 50
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[-1] < found[0]
    for key in ("entropy", "num_tokens"):
        logged = [[entry[key] for entry in trainer.state.log_history if key in entry] for trainer in (plain, fast)]
        assert logged[1] == pytest.approx(logged[0], rel=1e-3)


def test_padding_does_not_change_the_loss_of_a_row(tmp_path, tiny):
    trainer = trainer_for(small_gpt2(True), tmp_path, tiny)
    score_supervised_only(trainer.model)
    trainer.model.eval()
    row = {key: torch.tensor([value]) for key, value in rows(1)[0].items()}
    padded = {
        "input_ids": F.pad(row["input_ids"], (0, 9), value=50),
        "labels": F.pad(row["labels"], (0, 9), value=IGNORED),
    }
    alone, beside = (trainer.model(**batch, fused_lm_head=True).log_probs.sum() for batch in (row, padded))
    torch.testing.assert_close(alone, beside)


def test_generation_and_plain_forward_are_untouched(tmp_path, tiny):
    trainer = trainer_for(small_gpt2(True), tmp_path, tiny)
    ids = torch.tensor([[5, 6, 7]])
    expected = copy.deepcopy(trainer.model).eval()(input_ids=ids, labels=ids)
    score_supervised_only(trainer.model)
    found = trainer.model.eval()(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


def test_precision_is_chosen_with_a_reason_and_the_user_wins(tmp_path):
    chosen = SmallModelConfig(output_dir=str(tmp_path))
    assert (chosen.bf16, chosen.precision_reason) == choose_bf16(chosen.use_cpu)
    asked = SmallModelConfig(output_dir=str(tmp_path), bf16=False)
    assert (asked.bf16, asked.precision_reason) == (False, "as asked for")
    assert SmallModelConfig(output_dir=str(tmp_path)).gradient_checkpointing is False


def test_data_of_another_model_is_refused(tiny):
    own = PreTrainedTokenizerFast.from_pretrained(tiny.base)
    fitting = GPT2LMHeadModel(GPT2Config(vocab_size=len(own), n_positions=16, n_embd=8, n_layer=1, n_head=1))
    check_fit(fitting, own, own, longest=16)
    with pytest.raises(UserError, match="rows of 17 tokens and the model's context is 16"):
        check_fit(fitting, own, own, longest=17)
    with pytest.raises(UserError, match=f"97 rows for the {len(own)} tokens"):
        check_fit(small_gpt2(True), own, own, longest=10)

    longer = copy.deepcopy(own)
    longer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    check_fit(fitting, own, longer, longest=16)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})))
    with pytest.raises(UserError, match=f"with 2 tokens and the model's tokenizer has {len(own)}, of which"):
        check_fit(fitting, own, other, longest=10)


def test_loss_curve_is_a_picture(tmp_path):
    history = [{"step": 1, "loss": "2.0"}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.6}]
    save_loss_curve(history, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_run_record_names_what_was_chosen_and_no_path(tiny):
    record = json.loads((tiny.model / "run.json").read_text(encoding="utf-8"))
    chosen = record["hyperparameters"]
    assert (chosen["learning_rate"], chosen["num_train_epochs"]) == (0.01, 12.0)
    assert chosen["train_sampling_strategy"] == "group_by_length"
    assert str(tiny.model.parent) not in json.dumps(record)
    assert record["last_loss"] < record["first_loss"]
    assert record["effective_batch_size"] == 8
    assert record["rows"]["train"] > 0
    assert set(record["versions"]) == {"python", "fledge", "torch", "transformers", "trl", "datasets"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, 6),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 3),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "4"}, None),
        ({"OMP_NUM_THREADS": "1"}, None),
    ],
)
def test_a_process_of_accelerate_launch_gets_its_share_of_the_cores(variables, expected, monkeypatch, tmp_path):
    config = SmallModelConfig(output_dir=str(tmp_path), use_cpu=True)
    for name in ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    said = use_all_threads(config)
    assert chosen == ([expected] if expected else [])
    assert (said is None) == (expected is None)
