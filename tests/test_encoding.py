import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fledge.encoding import IGNORED, OVERFLOW_POLICIES, Encoded, encode, fit, prompt_text
from fledge.templates import load_template
from fledge.tokenizers import load_tokenizer

END = "<|endoftext|>"
CORPUS = [
    "Once upon a time there was a dog. The dog ran to the park and was happy.",
    "Write a story about: a little girl and her dog.\nWith: happy ending\n\n### Story:\n",
    '"Look," said the girl.\n\nThe end was sad.',
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(lambda text: END not in text)


def byte_level_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = load_template("story")
    return wrapped


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(400)


@pytest.fixture(scope="module")
def gpt2():
    tokenizer = load_tokenizer("gpt2", 512)
    tokenizer.chat_template = load_template("story")
    return tokenizer


def encode_one(tokenizer, instruction: str, response: str) -> Encoded:
    (encoded,) = encode(tokenizer, [instruction], [response])
    return encoded


def test_ids_and_labels_of_one_example():
    """Without merges, the id of a byte is its place in the byte-level alphabet, after the one special token."""
    tokenizer = byte_level_tokenizer(257)

    # fmt: off
    assert encode_one(tokenizer, "Hi.", "Oh no!").row == {
        #              H   i   .   \n   \n   #  #  #  " "  S   t   o   r   y   :   \n   O   h  " "  n   o  ! end
        "input_ids": [40, 73, 14, 199, 199, 3, 3, 3, 221, 51, 84, 79, 82, 89, 26, 199, 47, 72, 221, 78, 79, 1, 0],
        "labels": [-100] * 16 + [47, 72, 221, 78, 79, 1, 0],
    }
    # fmt: on


def test_the_prompt_reads_literally(tokenizer):
    instruction = "Write a story about: A cat.\nWith: sad ending"

    assert prompt_text(tokenizer, instruction) == ("Write a story about: A cat.\nWith: sad ending\n\n### Story:\n")


def test_a_batch_keeps_its_order(tokenizer):
    instructions, responses = ["About a dog.", "About a girl."], ["The dog ran.", "She was happy."]

    assert encode(tokenizer, instructions, responses) == [
        encode_one(tokenizer, *pair) for pair in zip(instructions, responses, strict=True)
    ]


def test_instructions_without_a_response_each_are_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"shorter|longer"):
        encode(tokenizer, ["one", "two"], ["one"])


@settings(deadline=None, max_examples=100)
@given(instruction=TEXT, response=TEXT)
def test_training_sees_the_ids_that_inference_sends(tokenizer, instruction, response):
    sent = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    encoded = encode_one(tokenizer, instruction, response)

    assert encoded.prompt_ids == sent
    assert encoded.completion_ids == [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    assert encoded.row["input_ids"] == encoded.prompt_ids + encoded.completion_ids


@settings(deadline=None, max_examples=50)
@given(instruction=TEXT, response=TEXT)
def test_the_whole_chat_is_prompt_response_and_end(tokenizer, instruction, response):
    messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]

    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == prompt_text(tokenizer, instruction) + response + END


@settings(deadline=None, max_examples=150)
@given(instruction=TEXT, response=TEXT)
def test_the_supervised_labels_decode_to_the_response(tokenizer, instruction, response):
    row = encode_one(tokenizer, instruction, response).row
    supervised = [label for label in row["labels"] if label != IGNORED]

    assert len(row["labels"]) == len(row["input_ids"])
    assert tokenizer.decode(supervised) == response + END
    assert tokenizer.decode(row["input_ids"]) == prompt_text(tokenizer, instruction) + response + END


@pytest.mark.parametrize(
    ("turns", "masked"),
    [
        ([("user", "About a dog."), ("assistant", "It ran.")], f"It ran.{END}"),
        (
            [("user", "A dog."), ("assistant", "It ran."), ("user", "A cat."), ("assistant", "It sat.")],
            f"It ran.{END}It sat.{END}",
        ),
        ([("user", "About a dog.")], ""),
    ],
)
def test_the_generation_mask_covers_response_and_end(tokenizer, turns, masked):
    chat = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = chat["assistant_masks"]

    assert tokenizer.decode([i for i, m in zip(chat["input_ids"], mask, strict=True) if m]) == masked


@pytest.mark.parametrize(
    "response", ['"Hello," he said.', " He ran.", "\nHe ran.", "\n\nHe ran.", "He ran.", "  \n two", "’Twas.", "1 dog."]
)
def test_no_token_spans_the_boundary(gpt2, response):
    instruction = "Write a story about: A dog.\nWith: happy ending"
    encoded = encode_one(gpt2, instruction, response)

    assert encoded.prompt_ids == encode_one(gpt2, instruction, "").prompt_ids
    assert gpt2.decode(encoded.prompt_ids) == f"{instruction}\n\n### Story:\n"
    assert gpt2.decode(encoded.completion_ids) == response + END


def test_encoding_prompt_and_response_in_one_would_merge_them(gpt2):
    encoded = encode_one(gpt2, "A dog.", "\n\nHe ran.")

    joined = gpt2(prompt_text(gpt2, "A dog.") + "\n\nHe ran." + END)["input_ids"]
    assert gpt2.decode(joined) == gpt2.decode(encoded.row["input_ids"])
    assert joined != encoded.row["input_ids"]


# A prompt of three tokens and an answer of two words and end-of-text, which is 9.
@pytest.mark.parametrize(
    ("overflow", "max_length", "prompt", "completion", "was_cut"),
    [
        ("drop", 7, [1, 2, 3], [4, 5, 9], False),
        ("drop", 6, [1, 2, 3], [4, 5, 9], False),
        ("drop", 5, None, None, None),
        ("cut_prompt", 6, [1, 2, 3], [4, 5, 9], False),
        ("cut_prompt", 5, [2, 3], [4, 5, 9], True),
        ("cut_prompt", 4, [3], [4, 5, 9], True),
        ("cut_prompt", 3, None, None, None),
        ("cut_completion", 6, [1, 2, 3], [4, 5, 9], False),
        ("cut_completion", 5, [1, 2, 3], [4, 5], True),
        ("cut_completion", 4, [1, 2, 3], [4], True),
        ("cut_completion", 3, None, None, None),
    ],
)
def test_overflow(overflow, max_length, prompt, completion, was_cut):
    fitted = fit(Encoded([1, 2, 3], [4, 5, 9]), max_length, overflow)

    assert fitted == (None if prompt is None else Encoded(prompt, completion, was_cut))


IDS = st.lists(st.integers(10, 20), max_size=12)


@settings(deadline=None, max_examples=300)
@given(
    prompt=st.lists(st.integers(10, 20), min_size=1, max_size=12),
    answer=IDS,
    max_length=st.integers(1, 30),
    overflow=st.sampled_from(OVERFLOW_POLICIES),
)
def test_every_fitted_example_keeps_the_promises_of_its_policy(prompt, answer, max_length, overflow):
    end = 9
    whole = Encoded(prompt, [*answer, end])
    fitted = fit(whole, max_length, overflow)

    if len(whole) <= max_length:
        assert fitted == whole
    elif overflow == "drop":
        assert fitted is None
    elif fitted is not None:
        assert fitted.was_cut
        assert len(fitted) == max_length
        assert fitted.prompt_ids
        assert fitted.completion_ids
        is_complete = len(fitted.completion_ids) == len(whole.completion_ids)
        assert (fitted.completion_ids[-1] == end) == is_complete
        if overflow == "cut_prompt":
            assert fitted.completion_ids == whole.completion_ids
            assert whole.prompt_ids[-len(fitted.prompt_ids) :] == fitted.prompt_ids
        else:
            assert fitted.prompt_ids == whole.prompt_ids
            assert whole.completion_ids[: len(fitted.completion_ids)] == fitted.completion_ids
    else:
        spared = whole.completion_ids if overflow == "cut_prompt" else whole.prompt_ids
        assert len(spared) >= max_length


def test_fitting_leaves_the_example_itself_alone():
    whole = Encoded([1, 2, 3], [4, 5, 9])
    fit(whole, 4, "cut_prompt")
    fit(whole, 4, "cut_completion")

    assert whole == Encoded([1, 2, 3], [4, 5, 9])
