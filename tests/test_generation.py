import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

from fledge.cli import UserError
from fledge.encoding import encode_prompt
from fledge.generation import answer_all, answer_batch, load_model
from fledge.sampling import Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def opened(tiny):
    return load_model(str(tiny.model))


def prompts_of(tokenizer, count: int) -> list[list[int]]:
    texts = [f"Write a story about: Lily took a {'very ' * (i % 4)}big kite.\nWith: sad ending" for i in range(count)]
    return [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def test_batched_equals_single_and_a_plain_loop(opened):
    model, tokenizer = opened
    prompts = prompts_of(tokenizer, 7)
    together = answer_all(model, tokenizer, prompts, GREEDY, 4, lambda done: None)
    alone = [answer_batch(model, tokenizer, [prompt], GREEDY, 0)[0] for prompt in prompts]
    assert together == alone
    ids = list(prompts[0])
    with torch.no_grad():
        while len(ids) < len(prompts[0]) + 24 and (len(ids) == len(prompts[0]) or ids[-1] != tokenizer.eos_token_id):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    assert tokenizer.decode(ids[len(prompts[0]) :], skip_special_tokens=True).strip() == alone[0].text


def test_the_seed_decides(opened):
    model, tokenizer = opened
    prompts, hot = prompts_of(tokenizer, 3), Sampling(temperature=1.5, max_new_tokens=24)
    first, again = (answer_all(model, tokenizer, prompts, hot, 2, lambda done: None) for _ in range(2))
    other = answer_all(
        model, tokenizer, prompts, Sampling(temperature=1.5, max_new_tokens=24, seed=9), 2, lambda d: None
    )
    assert first == again
    assert first != other


def test_never_past_the_context(opened):
    model, tokenizer = opened
    context = model.config.max_position_embeddings
    answer = answer_batch(model, tokenizer, [[5] * (context - 3)], Sampling(max_new_tokens=50), 0)[0]
    assert answer.tokens <= 3
    with pytest.raises(UserError, match=f"leaves no room in the model's context of {context}"):
        answer_batch(model, tokenizer, [[5] * context], GREEDY, 0)


def test_stopped_means_end_of_text(opened):
    model, tokenizer = opened
    cut, whole = (
        answer_batch(model, tokenizer, prompts_of(tokenizer, 1), Sampling(temperature=0, max_new_tokens=n), 0)[0]
        for n in (2, 70)
    )
    assert (cut.stopped, cut.tokens) == (False, 2)
    assert whole.stopped
    assert whole.tokens == len(tokenizer(whole.text)["input_ids"]) + 1


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values).check()


def test_generate_streams_one_answer_and_numbers_several(tiny):
    topic = ["--topic", "Lily took a ball to the park number 3.", "--ending", "sad", "--temperature", 0]
    one = run_script("generate.py", "--model", tiny.model, *topic)
    two = run_script("generate.py", "--model", tiny.model, *topic, "--num_samples", 2)
    assert "### Story" not in one.stdout
    assert two.stdout.split("--- 2")[0].removeprefix("--- 1").strip() == one.stdout.strip()


def test_a_base_model_continues_the_text_itself(tiny):
    done = run_script("generate.py", "--model", tiny.base, "--prompt", "Lily had a", "--max_new_tokens", 5)
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "nowhere", "--prompt", "x"],
        ["--model", "nowhere"],
        ["--model", "nowhere", "--topic", "x", "--ending", "odd"],
        ["--model", "nowhere", "--topic", "x", "--top_p", "2"],
    ],
)
def test_bad_input_is_one_sentence(arguments):
    done = subprocess.run(
        [sys.executable, "generate.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
