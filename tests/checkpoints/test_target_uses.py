"""What is done with a converted model, in every class that one is converted to."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_gpts import models
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fledge.checkpoints.targets import TARGETS
from fledge.errors import UserError
from fledge.exporting.architectures import ARCHITECTURES
from fledge.exporting.gguf_file import write_gguf
from fledge.exporting.onnx_graph import WithCache, cache_of, write_onnx
from fledge.exporting.programs import ONNX_TOLERANCE, OnnxRuntime, largest_error, logits_of
from fledge.generation.answers import answer_all, is_batched
from fledge.models import context_of
from fledge.sampling import Sampling
from fledge.training.attention import attend_by_rows
from fledge.training.loss import has_plain_logits, score_supervised_only

pytestmark = pytest.mark.slow  # each class is trained, exported and answers

few = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


PLAIN = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()))


class Spelled:
    """A tokenizer whose text is the ids themselves; 7 ends."""

    eos_token_id = 7

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("target", TARGETS)
@few
@given(st.data())
def test_greedy_answers_to_uneven_prompts_are_those_of_generate(target, data):
    model = data.draw(models(target, shortest=9))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in (1, 6, 2, 4, 7)]
    answers = answer_all(model, Spelled(), prompts, Sampling(temperature=0, max_new_tokens=5), 3, lambda done: None)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, room = torch.tensor([prompt]), context_of(model.config) - len(prompt)
        settings = GenerationConfig(max_new_tokens=min(5, room), do_sample=False, eos_token_id=7, pad_token_id=0)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, len(prompt) :]
        ours, theirs = [*map(int, answer.text.split()), 7], [token for token in made.tolist() if token != 7] + [7]
        apart = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if apart is not None:  # capped logits of random weights may be equal but for rounding
            logits = model(torch.tensor([prompt + ours[:apart]])).logits[0, -1]
            assert (logits[ours[apart]] - logits[theirs[apart]]).abs() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("target", TARGETS)
@few
@given(st.data())
def test_loss_and_gradients_of_fledges_head_are_those_of_transformers(target, data):
    model = data.draw(models(target, shortest=6)).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (3, context_of(model.config)), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :2], labels[0, -2:], mask[0, -2:] = -100, -100, 0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def loss_and_gradients(**head):
        model.zero_grad()
        loss = model(**batch, **head).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    said = model.config.to_dict()
    is_plain = said.get("final_logit_softcapping") is None and said.get("logits_scaling", 1) == 1
    assert has_plain_logits(model.config) == is_plain
    expected = loss_and_gradients()
    if has_plain_logits(model.config):
        score_supervised_only(model)
        torch.testing.assert_close(loss_and_gradients(fused_lm_head=True), expected, atol=1e-5, rtol=1e-4)
    if model.config._attn_implementation == "sdpa":
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**batch).loss
            attend_by_rows(model)
            torch.testing.assert_close(model(**batch | {"attention_mask": None}).loss, rounded, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("target", TARGETS)
@few
@given(st.data())
def test_the_exported_call_computes_the_same_in_steps(target, data):
    """What onnxruntime calls has a mask of its own, and keys and values go in and come out."""
    model = data.draw(models(target, shortest=9))
    if not is_batched(model):
        with TemporaryDirectory() as folder, pytest.raises(UserError) as refused:
            write_onnx(model, PLAIN, Path(folder), [])
        assert f"without sliding windows and ALiBi, and this {target} has one" in str(refused.value)
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=generator)
    call, positions, logits = WithCache(model), torch.arange(9).expand(2, -1), []
    with torch.no_grad():
        past = [part[:, :, :0] for part in cache_of(model, ids)]
        for begin, end in ((0, 5), (5, 8), (8, 9)):
            mask = torch.ones(2, end, dtype=torch.long)
            found, *past = call(ids[:, begin:end], mask, positions[:, begin:end], past)
            logits.append(found)
        torch.testing.assert_close(torch.cat(logits, 1), model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


# One trace takes four seconds. Between them these have every operator that the other classes' graphs have. GPT-2 with
# two layers is traced by the tests of export.py and of the static Space.
TRACED = ("llama", "opt", "gemma2", "qwen2_moe")


@pytest.mark.parametrize("target", TRACED)
@settings(few, max_examples=1)
@given(st.data())
def test_onnx_computes_the_same(target, data):
    pytest.importorskip("onnxruntime")
    model = data.draw(models(target, shortest=9, layers=(1,)).filter(is_batched))  # each layer is traced alike
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5]]
    with TemporaryDirectory() as folder:
        write_onnx(model, PLAIN, Path(folder), [])
        found = logits_of(OnnxRuntime(Path(folder) / "onnx" / "model.onnx"), prompts)
        assert largest_error(model, prompts, found) <= ONNX_TOLERANCE


@pytest.mark.parametrize("target", [target for target in TARGETS if target not in ARCHITECTURES])
@settings(few, max_examples=1)
@given(st.data())
def test_gguf_is_refused_in_a_class_that_is_not_exported(target, data):
    with TemporaryDirectory() as folder, pytest.raises(UserError) as refused:
        write_gguf(data.draw(models(target, shortest=1)), None, Path(folder) / "model.gguf", None)
    assert str(refused.value) == f"GGUF export does gpt2, llama, stablelm; this model is a {target}."


@few
@given(st.data())
def test_gguf_of_a_llama_names_the_width_of_its_heads(data):
    model = data.draw(models("llama", shortest=1))
    model.config.hidden_act = "silu"
    keys, tensors = ARCHITECTURES["llama"](model.config, model.state_dict())
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert keys[key] == len(tensors["blk.0.attn_q.weight"]) // model.config.num_attention_heads
