import copy

import pytest
import torch
import torch.nn.functional as F
from small import MODELS, VOCAB_SIZE, random_rows, small_gpt2, trainer_for
from transformers import Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig
from trl import SFTTrainer

from fledge.encoding import IGNORED
from fledge.training import loss as fledge_loss
from fledge.training.loss import ScoreTokens, has_plain_logits, score_supervised_only
from fledge.training.trainer import prepare_model


def scores_by_definition(hidden, weight, bias, targets) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias)
    log_probs = F.log_softmax(logits, -1)
    chosen = log_probs.gather(1, targets[:, None])[:, 0]
    entropy, squares = -(log_probs.exp() * log_probs).sum(-1), log_probs.exp().square().sum(-1).log()
    return torch.stack([chosen, entropy, (log_probs.argmax(-1) == targets).to(chosen.dtype), logits.mean(-1), squares])


@pytest.mark.parametrize("kept", [1 << 27, 7 * VOCAB_SIZE, 1])
@pytest.mark.parametrize("cached", [1 << 19, 5 * VOCAB_SIZE, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_scores_and_gradients_by_definition_for_any_way_of_cutting(kept, cached, biased, monkeypatch):
    monkeypatch.setattr(fledge_loss, "KEPT", kept)
    monkeypatch.setattr(fledge_loss, "CACHED", cached)
    torch.manual_seed(0)
    tensors = [torch.randn(23, 16), torch.randn(VOCAB_SIZE, 16) / 4, torch.randn(VOCAB_SIZE) if biased else None]
    targets, weights = torch.randint(VOCAB_SIZE, (23,)), torch.randn(23)
    exact = [None if x is None else x.double().requires_grad_() for x in tensors]
    expected = scores_by_definition(*exact, targets)
    (expected[0] * weights).sum().backward()
    found_in = [None if x is None else x.clone().requires_grad_() for x in tensors]
    found = ScoreTokens.apply(*found_in, targets, 5)
    (found[0] * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    again = [None if x is None else x.detach().requires_grad_() for x in found_in]
    alone = ScoreTokens.apply(*again, targets, 1)
    (alone[0] * weights).sum().backward()
    assert torch.equal(alone[0], found[0])
    for mine, theirs in zip(again, found_in, strict=True):
        assert mine is None or torch.equal(mine.grad, theirs.grad)
    with torch.no_grad():
        assert torch.equal(ScoreTokens.apply(*again, targets, 1)[0], found[0])
    for mine, theirs in zip(found_in, exact, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_near_float32_whatever_the_tokens_weigh():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(400, 32), torch.randn(VOCAB_SIZE, 32) / 6, torch.randint(VOCAB_SIZE, (400,))
    gradients = []
    for enabled in (False, True):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            scores = ScoreTokens.apply(*inputs, None, targets, 3)
        (scores[0].sum() / 1783).backward()
        gradients.append([x.grad for x in inputs])
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        # Roundings cancel over the entries; a common factor, as of 1/1783 in bfloat16, would not.
        assert ((exact * rounded).sum() / exact.square().sum()).item() == pytest.approx(1, abs=5e-4)
        assert ((rounded - exact).norm() / exact.norm()).item() < 1e-2


def batch_of(trainer: SFTTrainer) -> dict:
    return dict(next(iter(trainer.get_train_dataloader())))


def loss_and_gradients(trainer: SFTTrainer, batch: dict) -> tuple[float, dict]:
    model = trainer.model
    model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_equal_trl_and_the_definition(kind, tmp_path):
    plain, fast = trainer_for(MODELS[kind](), tmp_path / "a"), trainer_for(MODELS[kind](), tmp_path / "b")
    score_supervised_only(fast.model)
    batch = batch_of(plain)
    expected_loss, expected = loss_and_gradients(plain, batch)
    loss, found = loss_and_gradients(fast, batch)

    model = MODELS[kind]().double()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:].reshape(-1)
    by_hand = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB_SIZE), targets, ignore_index=IGNORED)
    by_hand.backward()
    exact = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(by_hand.item(), abs=1e-5)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert found.keys() == expected.keys() == exact.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[name], exact[name], atol=1e-5, rtol=1e-4)


def losses_of_training(trainer: SFTTrainer) -> list[float]:
    losses, compute_loss = [], trainer.compute_loss

    def recording(*arguments, **keywords):
        loss = compute_loss(*arguments, **keywords)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = recording
    trainer.train()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 2e-2)])
def test_two_dozen_steps_equal_trl(bf16, tolerance, tmp_path):
    changes = {"max_steps": 24, "bf16": bf16, "use_cpu": True}
    plain = trainer_for(small_gpt2(), tmp_path / "a", **changes)
    expected = losses_of_training(plain)
    fast = trainer_for(small_gpt2(), tmp_path / "b", **changes)
    assert prepare_model(fast).startswith("Loss: supervised positions only")
    found = losses_of_training(fast)
    assert len(found) == 24
    assert found == pytest.approx(expected, abs=tolerance)
    assert found[-1] < found[0]
    for key in ("entropy", "mean_token_accuracy", "num_tokens"):
        logged = [[entry[key] for entry in trainer.state.log_history if key in entry] for trainer in (plain, fast)]
        assert logged[1] == pytest.approx(logged[0], rel=1e-3 if not bf16 else 2e-2, abs=2e-2 if bf16 else 1e-6)


def test_a_batch_equals_its_rows_accumulated(tmp_path):
    rows = random_rows(8)
    weights = []
    for size in (8, 1):
        trainer = trainer_for(
            small_gpt2(),
            tmp_path / str(size),
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            warmup_steps=0,
        )
        score_supervised_only(trainer.model)
        trainer.train()
        weights.append(trainer.model.state_dict())
    untrained = small_gpt2().state_dict()
    for name in untrained:
        torch.testing.assert_close(*(w[name] for w in weights), atol=1e-5, rtol=1e-4)
    assert not torch.equal(weights[0]["transformer.wte.weight"], untrained["transformer.wte.weight"])


def test_packed_documents_do_not_see_each_other(tmp_path):
    rows = random_rows(4)
    trainer = trainer_for(small_gpt2(), tmp_path, rows, packing=True, max_length=128)
    score_supervised_only(trainer.model)
    trainer.model.eval()
    packed = batch_of(trainer)
    assert packed["input_ids"].shape[0] == 1
    together = trainer.model(**packed, fused_lm_head=True)
    apart = [
        trainer.model(**{key: torch.tensor([value]) for key, value in row.items()}, fused_lm_head=True) for row in rows
    ]
    torch.testing.assert_close(together.log_probs.sum(), sum(one.log_probs.sum() for one in apart))
    assert together.label_mask.sum() == sum(one.label_mask.sum() for one in apart)


def test_padding_does_not_change_the_loss_of_a_row(tmp_path):
    trainer = trainer_for(small_gpt2(), tmp_path)
    score_supervised_only(trainer.model)
    trainer.model.eval()
    row = {key: torch.tensor([value]) for key, value in random_rows(1)[0].items()}
    padded = {
        "input_ids": F.pad(row["input_ids"], (0, 9), value=50),
        "labels": F.pad(row["labels"], (0, 9), value=IGNORED),
    }
    alone, beside = (trainer.model(**batch, fused_lm_head=True).log_probs.sum() for batch in (row, padded))
    torch.testing.assert_close(alone, beside)


@pytest.mark.parametrize("count", [3, 300])
def test_few_shapes_change_neither_scores_nor_gradients(count, tmp_path):
    """Supervised tokens become a multiple of 32, or of 256 if they are more."""
    torch.manual_seed(0)
    labels = torch.full((10, 40), IGNORED)
    labels.view(-1)[torch.randperm(400)[:count]] = 9
    batch = {"input_ids": torch.randint(0, VOCAB_SIZE, (10, 40)), "labels": labels}
    found = []
    for few_shapes in (False, True):
        model = trainer_for(small_gpt2(), tmp_path).model.eval()
        score_supervised_only(model, few_shapes=few_shapes)
        output = model(**batch, fused_lm_head=True)
        output.loss.backward()
        found.append([output.log_probs, output.entropy, *(p.grad for p in model.parameters())])
    for expected, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, expected, atol=1e-6, rtol=1e-5)


def test_a_batch_without_supervised_tokens_gives_zero_with_gradients(tmp_path):
    trainer = trainer_for(small_gpt2(), tmp_path)
    score_supervised_only(trainer.model)
    ids = torch.tensor([[5, 6, 7]])
    output = trainer.model(input_ids=ids, labels=torch.full_like(ids, IGNORED), fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0
    assert all((p.grad == 0).all() for p in trainer.model.parameters() if p.grad is not None)


def test_generation_and_plain_forward_are_untouched(tmp_path):
    trainer = trainer_for(small_gpt2(), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    expected = copy.deepcopy(trainer.model).eval()(input_ids=ids, labels=ids)
    score_supervised_only(trainer.model)
    found = trainer.model.eval()(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize(
    ("config", "plain"),
    [(GPT2Config(), True), (LlamaConfig(), True), (Gemma2Config(), False), (GraniteConfig(logits_scaling=2.0), False)],
)
def test_models_that_scale_or_cap_their_logits_keep_the_head_of_trl(config, plain):
    assert has_plain_logits(config) == plain
