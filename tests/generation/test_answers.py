import pytest
import torch
from conftest import call_script
from small import VOCAB_SIZE, WITHOUT_DROPOUT, small_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    StableLmConfig,
)

from fledge.encoding import encode_prompt
from fledge.errors import UserError
from fledge.generation import answers, cache
from fledge.generation.answers import answer_all, answer_batch, answer_each, continue_each
from fledge.models import load_model
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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_of_uneven_length_are_masked_whatever_the_attention(attention):
    """Eager attention adds its mask to the scores, where a mask of booleans hides nothing."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB_SIZE, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 2, "eos_token_id": 0}
    model = GPT2LMHeadModel._from_config(
        GPT2Config(**shape, initializer_range=0.5, **WITHOUT_DROPOUT), attn_implementation=attention
    ).eval()
    prompts = [[3, 4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [15] * 5]
    together = answer_all(model, small_tokenizer(), prompts, GREEDY, 3, lambda done: None)
    assert together == [answer_batch(model, small_tokenizer(), [prompt], GREEDY, 0)[0] for prompt in prompts]


def test_the_seed_decides(opened):
    model, tokenizer = opened
    prompts, hot = prompts_of(tokenizer, 3), Sampling(temperature=1.5, max_new_tokens=24)
    first, again = (answer_all(model, tokenizer, prompts, hot, 2, lambda done: None) for _ in range(2))
    other = answer_all(
        model, tokenizer, prompts, Sampling(temperature=1.5, max_new_tokens=24, seed=9), 2, lambda d: None
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_an_answer_does_not_depend_on_what_it_was_batched_with(opened, temperature):
    model, tokenizer = opened
    prompts, sampling = prompts_of(tokenizer, 9), Sampling(temperature=temperature, max_new_tokens=40)
    alone = dict(answer_each(model, tokenizer, prompts, sampling, 1))
    for batch_size in (3, 9):
        assert dict(answer_each(model, tokenizer, prompts, sampling, batch_size)) == alone
    later = dict(answer_each(model, tokenizer, prompts[5:], sampling, 4, numbers=[5, 6, 7, 8]))
    assert later == {number: alone[number] for number in (5, 6, 7, 8)}


class Spelled:
    """A tokenizer whose text is the ids themselves; 7 ends."""

    eos_token_id = 7

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


SIZES = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
MODELS = {
    "gpt2": GPT2Config(vocab_size=60, n_positions=48, n_embd=16, n_layer=2, n_head=4),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=24, max_position_embeddings=48),
    "stablelm": StableLmConfig(**SIZES, num_key_value_heads=4, intermediate_size=24, max_position_embeddings=48),
    "a sliding window": MistralConfig(**SIZES, num_key_value_heads=4, intermediate_size=24, sliding_window=8),
    "ALiBi": FalconConfig(**SIZES, alibi=True),
}


def random_model(config):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.get_output_embeddings().weight.data.mul_(40)  # far from ties
    return model


@pytest.mark.parametrize(("kind", "penalty"), [*((kind, 1.0) for kind in MODELS), ("gpt2", 1.7), ("llama", 1.7)])
def test_greedy_equals_generate(kind, penalty):
    model = random_model(MODELS[kind])
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(8, 60, (2 + 5 * i % 11,), generator=generator).tolist() for i in range(8)]
    sampling = Sampling(temperature=0, max_new_tokens=30, repetition_penalty=penalty)
    made = answer_all(model, Spelled(), prompts, sampling, 4, lambda done: None)
    for prompt, answer in zip(prompts, made, strict=True):
        settings = GenerationConfig(
            max_new_tokens=30, do_sample=False, eos_token_id=7, pad_token_id=0, repetition_penalty=penalty
        )
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, len(prompt) :]
        assert answer.tokens == len(made)
        assert answer.text.split() == [str(token) for token in made.tolist() if token != 7]
        assert answer.stopped == (7 in made.tolist())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "stablelm"])
def test_many_rows_in_groups_answer_as_one_alone(kind, monkeypatch):
    """Groups of two, more rows than fit, equal prompts among them, and answers that end at any length."""
    for module in (answers, cache):
        monkeypatch.setattr(module, "GROUP", 2)
    model, sampling = random_model(MODELS[kind]), Sampling(temperature=30, top_p=1, max_new_tokens=30)
    attention = model.config._attn_implementation
    prompts = [[8 + i // 3] * (1 + i // 3 % 5) for i in range(30)]
    alone = dict(continue_each(model, 7, prompts, sampling, 1))
    assert len({len(made) for made in alone.values()}) > 5
    for batch_size in (7, 30):
        assert dict(continue_each(model, 7, prompts, sampling, batch_size)) == alone
    assert model.config._attn_implementation == attention


def test_no_more_rows_are_held_than_a_batch_has(monkeypatch):
    """Answers end one after another, and a row that is free is soon filled again."""
    lengths = [i // 3 % 12 + 1 for i in range(60)]
    ends = lambda logits, texts, *_: [7 if len(text) >= lengths[3 * (text[0] - 8)] else 9 for text in texts]  # noqa: E731
    monkeypatch.setattr(answers, "choose", ends)
    model, held = random_model(MODELS["llama"]), []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: held.append(len(given[0])))
    made = dict(continue_each(model, 7, [[8 + i // 3] for i in range(60)], Sampling(max_new_tokens=20), 12))
    assert max(held) == 12
    assert [len(made[i]) for i in range(60)] == lengths


@pytest.mark.parametrize("queries", [1, 3])
def test_products_in_bfloat16_attend_by_definition(queries):
    """Three rows of two heads of keys, each head with some queries, and texts of 4, 7 and 9 tokens in 12 places."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2 * queries, 1, 16), torch.randn(3, 2, 12, 16), torch.randn(3, 2, 12, 16)
    seen = torch.arange(12) < torch.tensor([4, 7, 9])[:, None, None, None]
    each = [x.repeat_interleave(queries, 1).double() for x in (key, value)]
    scores = (query.double() @ each[0].mT * 0.2).masked_fill(~seen, float("-inf"))
    found, _ = cache.by_products(None, *(x.bfloat16() for x in (query, key, value)), seen, scaling=0.2)
    torch.testing.assert_close(found.transpose(1, 2).double(), scores.softmax(-1) @ each[1], atol=2e-2, rtol=2e-2)


def logits_of(model, prompts: list[list[int]], batch_size: int, monkeypatch) -> tuple[dict[tuple, Tensor], set[int]]:
    """The logits from which each token was chosen, by the text before it, and how many rows the steps had."""
    seen, rows = {}, set()

    def choose(logits, texts, *_):
        seen.update((tuple(text), row.double()) for text, row in zip(texts, logits, strict=True))
        return [(7 * sum(text) + len(text)) % 51 + (len(text) % 5 > 0) for text in texts]  # which ends now and then

    monkeypatch.setattr(answers, "choose", choose)

    def note(embeddings, given, output):
        rows.update(len(ids) for ids in given if ids.shape[1] == 1)

    hook = model.get_input_embeddings().register_forward_hook(note)
    list(continue_each(model, 0, prompts, Sampling(max_new_tokens=24), batch_size))
    hook.remove()
    return seen, rows


UNEVEN = [[8 + i, 9, 10][: 1 + i % 3] for i in range(50)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_under_autocast_logits_are_those_of_a_plain_forward_under_it(kind, monkeypatch):
    """They are as far from float64 as those of a plain forward are, in steps of few shapes."""
    for module in ("fledge.generation.cache", "fledge.generation.onednn"):  # also on a processor that emulates it
        monkeypatch.setattr(f"{module}.multiplies_bf16", lambda: True)
    model = random_model(MODELS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        found, rows = logits_of(model, UNEVEN, 50, monkeypatch)
        some = list(found)[::9]
        plain = {text: model(torch.tensor([text])).logits[0, -1].double() for text in some}
    exact = {text: logits[0, -1] for text in some for logits in [model.double()(torch.tensor([text])).logits]}
    ours, usual = (torch.stack([x[text] - exact[text] for text in some]).std() for x in (found, plain))
    assert 0 < ours < 1.2 * usual
    assert rows <= {16, 32, 64}


def test_without_products_in_bfloat16_a_step_has_its_own_rows_in_float32(monkeypatch):
    """Neither autocast nor the number of rows changes anything there."""
    for module in ("fledge.generation.cache", "fledge.generation.onednn"):
        monkeypatch.setattr(f"{module}.multiplies_bf16", lambda: False)
    model = random_model(MODELS["gpt2"])
    found, rows = logits_of(model, UNEVEN, 50, monkeypatch)
    assert not rows <= {16, 32, 64}
    with torch.no_grad():
        for text, logits in list(found.items())[::9]:
            torch.testing.assert_close(logits.float(), model(torch.tensor([text])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_equal_prompts_are_read_once():
    model, read = random_model(MODELS["llama"]), []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, given, __: read.append(given[0].shape))
    list(continue_each(model, None, [[9, 10, 11]] * 8 + [[12, 13, 14]] * 8, Sampling(max_new_tokens=2), 16))
    hook.remove()
    assert [tuple(shape) for shape in read] == [(2, 3), (16, 1)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_in_bfloat16_answers_are_near_those_of_generate(kind):
    """Attention rounds otherwise there; an answer in four may differ."""
    model = random_model(MODELS[kind]).bfloat16()
    prompts = [[8 + i, 9, 10][: 1 + i % 3] for i in range(20)]
    made = dict(continue_each(model, None, prompts, Sampling(temperature=0, max_new_tokens=3), 20))
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    same = 0
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[
            0, len(prompt) :
        ]
        same += made[i] == expected.tolist()
    assert same >= 15


@pytest.mark.parametrize("kind", ["llama", "ALiBi"])
def test_tokens_and_text_are_of_one_answer(kind):
    model, sampling = random_model(MODELS[kind]), Sampling(max_new_tokens=30)
    prompts = [[8 + i] * (1 + i) for i in range(9)]
    prompts[3][-1] = 7  # a prompt may end with the token that ends an answer
    tokens = dict(continue_each(model, 7, prompts, sampling, 4))
    for number, answer in answer_each(model, Spelled(), prompts, sampling, 4):
        assert answer.stopped == (tokens[number][-1] == 7)
        assert answer.tokens == len(tokens[number]) <= 30
        assert answer.text.split() == [str(token) for token in tokens[number] if token != 7]


def test_a_model_without_keys_and_values_is_refused():
    model = random_model(MambaConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, max_position_embeddings=48))
    with pytest.raises(UserError, match=r"keeps no keys and values, as recurrent models do; use pipeline\(\)"):
        answer_all(model, Spelled(), [[1, 2]], GREEDY, 1, lambda done: None)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0, -30.0, -30.0, -30.0])

    class Fixed(torch.nn.Module):
        """The same logits after every token."""

        config, device, _supports_attention_backend = MODELS["gpt2"], torch.device("cpu"), False

        def forward(self, input_ids, position_ids=None, past_key_values=None, logits_to_keep=(0,), **_):
            of_all = logits.expand(len(input_ids), len(logits_to_keep), -1)
            return type("Output", (), {"logits": of_all})

    sampling = Sampling(temperature=1, top_p=1, max_new_tokens=46)
    answers = answer_all(Fixed(), Spelled(), [[1, 2]] * 200, sampling, 50, lambda done: None)
    drawn = [int(token) for answer in answers for token in answer.text.split()]
    shares = torch.bincount(torch.tensor(drawn), minlength=8) / len(drawn)
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.02, rtol=0)
    assert len({answer.text for answer in answers}) == 200


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
    one = call_script("generate.py", "--model", tiny.model, *topic)
    two = call_script("generate.py", "--model", tiny.model, *topic, "--num_samples", 2)
    assert "### Story" not in one.stdout
    assert two.stdout.split("--- 2")[0].removeprefix("--- 1").strip() == one.stdout.strip()


def test_a_base_model_continues_the_text_itself(tiny):
    done = call_script("generate.py", "--model", tiny.base, "--prompt", "Lily had a", "--max_new_tokens", 5)
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
    done = call_script("generate.py", *arguments, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
