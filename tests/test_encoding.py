import re

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fledge.encoding import (
    IGNORED,
    OVERFLOW_POLICIES,
    Encoded,
    encode,
    encode_prompt,
    encode_rejected,
    fit,
    marked,
    numbers_of,
    open_rows,
    prompt_length,
    prompt_text,
    shortest,
    with_messages,
)
from fledge.errors import UserError
from fledge.messages import INPUT_MARK
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


def chat(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def encode_one(tokenizer, *contents: str) -> Encoded:
    (encoded,) = encode(tokenizer, [chat(*contents)])
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


def test_ids_of_a_pair():
    """Chosen and rejected follow the same ids of the prompt. What ran into the limit has no end."""
    tokenizer = byte_level_tokenizer(257)
    encoded = encode(tokenizer, [chat("Hi.", "Oh no!")] * 2)
    encode_rejected(tokenizer, encoded, ["No", " Oh no, no"], [True, False])
    whole, cut = encoded

    # fmt: off
    prompt = [40, 73, 14, 199, 199, 3, 3, 3, 221, 51, 84, 79, 82, 89, 26, 199]
    assert (whole.prompt_ids, whole.completion_ids) == (prompt, [47, 72, 221, 78, 79, 1, 0])
    assert whole.rejected_ids == encode_one(tokenizer, "Hi.", "No").completion_ids == [46, 79, 0]
    assert cut.rejected_ids == [221, 47, 72, 221, 78, 79, 12, 221, 78, 79]
    # fmt: on
    assert (len(whole), len(cut)) == (16 + 7, 16 + 10)  # the longer answer counts
    assert fit(tokenizer, chat("Hi.", "Oh no!"), cut, 25, "drop") is None
    assert whole.row["rejected_ids"] == [46, 79, 0]
    assert "rejected_ids" not in encode_one(tokenizer, "Hi.", "Oh no!").row


def test_the_prompt_reads_literally(tokenizer):
    instruction = "Write a story about: A cat.\nWith: sad ending"

    assert prompt_text(tokenizer, chat(instruction)) == (
        "Write a story about: A cat.\nWith: sad ending\n\n### Story:\n"
    )


def test_a_batch_keeps_its_order(tokenizer):
    conversations = [("About a dog.", "The dog ran."), ("A girl.", "She ran.", "And?", "She sat."), ("Hi.", "Ho.")]

    assert encode(tokenizer, [chat(*contents) for contents in conversations]) == [
        encode_one(tokenizer, *contents) for contents in conversations
    ]


@settings(deadline=None, max_examples=100)
@given(instruction=TEXT, response=TEXT)
def test_training_sees_the_ids_that_inference_sends(tokenizer, instruction, response):
    sent = tokenizer.apply_chat_template(
        chat(instruction), tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    encoded = encode_one(tokenizer, instruction, response)

    assert encoded.prompt_ids == sent
    assert encoded.completion_ids == [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    assert encoded.row["input_ids"] == encoded.prompt_ids + encoded.completion_ids


@settings(deadline=None, max_examples=50)
@given(instruction=TEXT, response=TEXT)
def test_the_whole_chat_is_prompt_response_and_end(tokenizer, instruction, response):
    whole = tokenizer.apply_chat_template(chat(instruction, response), tokenize=False)
    assert whole == prompt_text(tokenizer, chat(instruction)) + response + END


@settings(deadline=None, max_examples=150)
@given(instruction=TEXT, response=TEXT)
def test_the_supervised_labels_decode_to_the_response(tokenizer, instruction, response):
    row = encode_one(tokenizer, instruction, response).row
    supervised = [label for label in row["labels"] if label != IGNORED]

    assert len(row["labels"]) == len(row["input_ids"])
    assert tokenizer.decode(supervised) == response + END
    assert tokenizer.decode(row["input_ids"]) == prompt_text(tokenizer, chat(instruction)) + response + END


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
    made = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = made["assistant_masks"]

    assert tokenizer.decode([i for i, m in zip(made["input_ids"], mask, strict=True) if m]) == masked


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

    joined = gpt2(prompt_text(gpt2, chat("A dog.")) + "\n\nHe ran." + END)["input_ids"]
    assert gpt2.decode(joined) == gpt2.decode(encoded.row["input_ids"])
    assert joined != encoded.row["input_ids"]


@pytest.mark.parametrize(("answer", "is_supervised"), [("It ran.", True), ("\n\nHe ran.", False)])
def test_an_earlier_answer_counts_where_its_ids_stay_the_same(gpt2, answer, is_supervised):
    (encoded,) = encode(gpt2, [chat("A dog.", answer, "And then?", "It sat.")])

    supervised = gpt2.decode([label for label in encoded.labels if label != IGNORED])
    assert supervised == (answer + END) * is_supervised + "It sat." + END


def test_a_control_token_in_one_of_several_messages_stays_text(gpt2):
    ids = encode_prompt(gpt2, chat(f"Say{END}it.", "yes", "Again?"))

    assert ids.count(gpt2.eos_token_id) == 1  # the answer's own
    assert gpt2.decode(ids).count(END) == 2


@pytest.mark.parametrize(
    ("labels", "length"), [([], 0), ([-100], 0), ([5, 6], 0), ([-100, -100, 5, 6], 2), ([-100, 5, -100, 6, -100], 3)]
)
def test_the_prompt_ends_where_the_last_answer_begins(labels, length):
    assert prompt_length(labels) == length


def counting(count: int) -> str:
    """Words of one token each under GPT-2's vocabulary, after an instruction of one."""
    return "Count" + INPUT_MARK + " ".join(["one", "two", "three", "four", "five", "six"][:count])


# Under `story` the prompt "Count\none two …\n\n### Story:\n" has eight tokens and one for each word; the answer two
# and end-of-text.
@pytest.mark.parametrize(
    ("overflow", "max_length", "words", "answer", "was_cut"),
    [
        ("drop", 17, 6, "yes yes" + END, False),
        ("drop", 16, None, None, None),
        ("cut_prompt", 17, 6, "yes yes" + END, False),
        ("cut_prompt", 16, 5, "yes yes" + END, True),
        ("cut_prompt", 12, 1, "yes yes" + END, True),
        ("cut_prompt", 11, None, None, None),
        ("cut_completion", 17, 6, "yes yes" + END, False),
        ("cut_completion", 16, 5, "yes yes" + END, True),  # the input goes before the answer does
        ("cut_completion", 12, 1, "yes yes" + END, True),
        ("cut_completion", 11, None, None, None),
    ],
)
def test_overflow_of_a_prompt_with_an_input(gpt2, overflow, max_length, words, answer, was_cut):
    messages = chat(counting(6), "yes yes")
    (whole,) = encode(gpt2, [messages])
    assert len(whole) == 17
    fitted = fit(gpt2, messages, whole, max_length, overflow)

    if words is None:
        assert fitted is None
    else:
        assert fitted[0] == chat(counting(words), "yes yes")
        assert len(fitted[1]) <= max_length
        assert gpt2.decode(fitted[1].completion_ids) == answer
        assert fitted[1].was_cut == was_cut
        assert fitted[1].prompt_ids == encode_prompt(gpt2, fitted[0][:-1])


# "Say it.\n\n### Story:\n" has nine tokens.
@pytest.mark.parametrize(
    ("overflow", "max_length", "fitted"),
    [
        ("cut_completion", 12, "yes yes" + END),
        ("cut_completion", 11, "yes yes"),
        ("cut_completion", 10, "yes"),
        ("cut_completion", 9, None),
        ("cut_prompt", 9, None),
    ],
)
def test_an_answer_that_is_cut_has_no_end(gpt2, overflow, max_length, fitted):
    messages = chat("Say it.", "yes yes")
    (whole,) = encode(gpt2, [messages])
    cut = fit(gpt2, messages, whole, max_length, overflow)

    if fitted is None:
        assert cut is None
    else:
        assert cut[0] == messages
        assert gpt2.decode([label for label in cut[1].labels if label != IGNORED]) == fitted
        assert cut[1].prompt_ids == whole.prompt_ids
        assert cut[1].was_cut == (len(whole) > max_length)


def test_without_a_text_the_oldest_turns_go_whole(gpt2):
    system = [{"role": "system", "content": "Be brief."}]
    messages = system + chat("Say it once and then again please", "yes", "Again.", "no", "And again.", "yes")
    (whole,) = encode(gpt2, [messages])
    shortened, encoded = fit(gpt2, messages, whole, len(whole) - 2, "cut_prompt")

    assert shortened == [*system, *messages[3:]]
    assert encoded.was_cut
    assert encoded.row == encode(gpt2, [shortened])[0].row
    last = len(encode(gpt2, [[*system, *messages[5:]]])[0])
    assert fit(gpt2, messages, whole, last, "cut_prompt")[0] == [*system, *messages[5:]]
    assert fit(gpt2, messages, whole, last - 1, "cut_prompt") is None


def test_turns_about_a_text_stay_and_the_text_is_cut(gpt2):
    messages = chat(counting(6), "yes", "Again?", "yes")
    (whole,) = encode(gpt2, [messages])

    assert fit(gpt2, messages, whole, len(whole) - 2, "cut_prompt")[0] == chat(counting(4), "yes", "Again?", "yes")


def test_of_two_texts_the_longer_one_is_cut(gpt2):
    messages = chat(counting(2), "yes", counting(6), "yes")
    (whole,) = encode(gpt2, [messages])

    cut = fit(gpt2, messages, whole, len(whole) - 2, "cut_prompt")[0]
    assert cut == chat(counting(2), "yes", counting(4), "yes")
    assert shortest(messages) == chat(counting(2), "yes", counting(1), "yes")


CONTENT = st.lists(st.sampled_from(["a", "dog", "ran,", "With: sad ending"]), min_size=1, max_size=12).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(
    contents=st.lists(CONTENT, min_size=1, max_size=4).map(
        lambda turns: [part for turn in turns for part in (turn, "yes")]
    ),
    given_text=st.none() | CONTENT,
    max_length=st.integers(1, 120),
    may_cut=st.booleans(),
)
def test_a_question_never_loses_a_word(tokenizer, contents, given_text, max_length, may_cut):
    messages = chat(*contents)
    if given_text:
        messages[0]["content"] += INPUT_MARK + given_text
    (whole,) = encode(tokenizer, [messages])
    fitted = fit(tokenizer, messages, whole, max_length, "cut_prompt", may_cut)

    if fitted is None:
        assert len(whole) > max_length
        assert not may_cut or len(encode(tokenizer, [shortest(messages)])[0]) > max_length
    else:
        assert len(fitted[1]) <= max_length
        questions = [m["content"].split(INPUT_MARK)[0] for m in messages]
        kept = [m["content"].split(INPUT_MARK)[0] for m in fitted[0]]
        assert kept == questions[len(questions) - len(kept) :]
        assert may_cut or fitted[0] == messages


@settings(deadline=None, max_examples=60)
@given(
    story=st.lists(st.sampled_from(["a", "dog", "ran,", "“hm”", "🦊"]), max_size=30).map(" ".join),
    answer=TEXT,
    max_length=st.integers(1, 80),
    overflow=st.sampled_from(OVERFLOW_POLICIES),
)
def test_every_fitted_example_keeps_the_promises_of_its_policy(tokenizer, story, answer, max_length, overflow):
    messages = chat("Sum up." + INPUT_MARK + story, answer)
    (whole,) = encode(tokenizer, [messages])
    fitted = fit(tokenizer, messages, whole, max_length, overflow)

    if len(whole) <= max_length:
        assert fitted == (messages, whole)
    elif overflow == "drop":
        assert fitted is None
    elif fitted is not None:
        shortened, encoded = fitted
        assert encoded.was_cut
        assert 0 < len(encoded) <= max_length
        assert story.startswith(shortened[0]["content"].removeprefix("Sum up." + INPUT_MARK))
        assert encoded.prompt_ids == encode_prompt(tokenizer, shortened[:-1])
        is_complete = encoded.completion_ids == whole.completion_ids
        assert is_complete == (encoded.input_ids[-1] == tokenizer.eos_token_id)
        if shortened != messages or overflow == "cut_prompt":
            assert is_complete


def test_fitting_leaves_the_example_itself_alone(gpt2):
    messages = chat(counting(6), "yes yes")
    (whole,) = encode(gpt2, [messages])
    for policy in OVERFLOW_POLICIES:
        fit(gpt2, messages, whole, 13, policy)

    assert messages == chat(counting(6), "yes yes")
    assert whole == encode(gpt2, [messages])[0]


ROWS = [
    {"messages": [], "kind": "words", "features": ["dialogue"], "count": 3},
    {"messages": [], "kind": "who", "features": [], "count": 3},
    {"messages": [], "kind": "words", "features": [], "count": None},
]


@pytest.mark.parametrize(
    ("only", "numbers"),
    [
        ([], [0, 1, 2]),
        (["kind=words"], [0, 2]),
        (["features=dialogue"], [0]),
        (["count=3"], [0, 1]),
        (["kind=words", "count=3"], [0]),
    ],
)
def test_rows_are_chosen_by_their_columns(only, numbers):
    assert numbers_of(ROWS, only) == numbers


@pytest.mark.parametrize(
    ("only", "said"),
    [
        (["kind"], "--only kind is no COLUMN=VALUE; the dataset's columns are count, features, kind."),
        (["messages=x"], "--only messages=x is no COLUMN=VALUE"),
        (["kind=moral"], "No row meets --only kind=moral; its values of kind: who, words."),
        (["count=None"], "No row meets --only count=None; its values of count: 3."),
        (["kind=who", "features=dialogue"], "No row meets --only features=dialogue; its values of features: none."),
    ],
)
def test_a_condition_that_no_row_meets_is_refused(only, said):
    with pytest.raises(UserError, match=re.escape(said)):
        numbers_of(ROWS, only)


@pytest.mark.parametrize(("values", "more"), [(10, "."), (11, ", …")])
def test_a_refusal_names_few_of_many_values(values, more):
    rows = [{"messages": [], "number": number} for number in range(10, 10 + values)]
    said = f"values of number: 10, 11, 12, 13, 14, 15, 16, 17, 18, 19{more}"
    with pytest.raises(UserError, match=re.escape(said)):
        numbers_of(rows, ["number=9"])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat("Hi.", "Ho.")},
        {"instruction": "Hi.", "response": "Ho."},
        {"prompt": chat("Hi."), "chosen": chat("Hi.", "Ho.")[1:]},
    ],
)
def test_a_row_of_any_form_becomes_messages(row):
    assert with_messages({**row, "kind": "greeting"}) == {"messages": chat("Hi.", "Ho."), "kind": "greeting"}


def test_rows_are_opened_by_split_with_the_names_of_their_classes(tmp_path):
    """A split may lie in several files."""
    text, ending = Value("string"), ClassLabel(names=["sad", "happy"])
    classes = Features({"instruction": text, "response": text, "ending": ending})
    for split, number, label in (("train", 0, 1), ("train", 1, 0), ("test", 0, 0)):
        row = {"instruction": f"{split} {number}", "response": "Ho.", "ending": label}
        file = tmp_path / "data" / f"{split}-0000{number}-of-00002.parquet"
        Dataset.from_list([row], classes).to_parquet(file)
    (tmp_path / "budget.json").write_text('{"splits": {"train": {}, "test": {}}}', encoding="utf-8")

    assert open_rows(tmp_path) == {
        "train": [
            {"messages": chat("train 0", "Ho."), "ending": "happy"},
            {"messages": chat("train 1", "Ho."), "ending": "sad"},
        ],
        "test": [{"messages": chat("test 0", "Ho."), "ending": "sad"}],
    }


def test_supervised_tokens_are_shown_between_marks(gpt2):
    row = encode_one(gpt2, "A dog.", "It ran.", "And then?", "It sat.").row
    shown = marked(gpt2, row["input_ids"], row["labels"], "[", "]")

    assert re.findall(r"\[(.*?)\]", shown) == ["It ran." + END, "It sat." + END]
    assert shown.replace("[", "").replace("]", "") == gpt2.decode(row["input_ids"])
