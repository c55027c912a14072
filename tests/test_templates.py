"""Every template with every task and every edge of text: one way of writing a prompt, and it is pipeline()'s."""

import functools

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, pipeline

from fledge.encoding import IGNORED, encode, encode_prompt, prompt_text
from fledge.errors import UserError
from fledge.messages import INPUT_MARK
from fledge.tasks import load_task, task_names
from fledge.templates import FOLDER, SPECIAL_TOKENS, add_template, load_template
from fledge.tokenizers import load_tokenizer

END = "<|endoftext|>"
TEMPLATES = sorted(file.stem for file in FOLDER.glob("*.jinja"))
EDGES = {
    "plain": "Tom ran.",
    "quotes": "\"Look,\" said 'Tom'.",
    "typographic quotes": "“Look,” said Tom’s mom.",
    "leading spaces": "   Tom ran.",
    "trailing spaces": "Tom ran.  ",
    "leading breaks": "\n\nTom ran.",
    "trailing breaks": "Tom ran.\n\n",
    "breaks within": "Tom\n\n\nran.\tFar.",
    "emoji": "🦊👩‍🚀 ran",
    "not latin": "Том побежал. 湯姆跑了。",
    "nothing": "",
    "a space": " ",
    "braces": "{{ message['content'] }} {% if %}",
    "the template's own words": "### Response:\n[/INST] ### Story:\n",
}
CONTROL = [
    END,
    f"{END}Tom ran.",
    f"Tom{END}{END} ran.",
    "<|user|>Say yes.<|assistant|>yes",
    "<|system|>",
    f"<|end{END}",
]


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


@functools.cache  # opening it takes a quarter of a second
def gpt2_with(template: str):
    tokenizer = load_tokenizer("gpt2", 512)
    add_template(tokenizer, template)
    return tokenizer


@pytest.fixture(scope="module", params=TEMPLATES)
def writer(request):
    """A pipeline over a model that says nothing of interest, and the list of the ids that it is sent."""
    tokenizer = gpt2_with(request.param)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=8, n_layer=1, n_head=1)
    model, sent = GPT2LMHeadModel(config), []
    generate = model.generate

    def listen(*arguments, **settings):
        sent.append(settings["input_ids"][0].tolist())
        return generate(*arguments, **settings)

    model.generate = listen
    return pipeline("text-generation", model=model, tokenizer=tokenizer), sent


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request):
    return gpt2_with(request.param)


@pytest.mark.parametrize("shape", ["one turn", "an input", "a system message", "turns"])
def test_training_prompts_are_what_the_pipeline_sends(writer, shape):
    write, sent = writer
    for edge in EDGES.values():
        asked = {
            "one turn": chat(edge),
            "an input": chat("Sum up." + INPUT_MARK + edge),
            "a system message": chat(edge, system="Be kind."),
            "turns": chat("Who?", edge or "Tom", edge),
        }[shape]
        sent.clear()
        write(asked, max_new_tokens=1, do_sample=False, pad_token_id=50256)
        (encoded,) = encode(write.tokenizer, [[*asked, {"role": "assistant", "content": edge}]])

        assert sent == [encoded.prompt_ids] == [encode_prompt(write.tokenizer, asked)]


@pytest.mark.parametrize("task", task_names())
def test_a_task_asks_as_the_pipeline_does(writer, task):
    write, sent = writer
    asked = load_task(task).example
    sent.clear()
    write(asked, max_new_tokens=1, do_sample=False, pad_token_id=50256)

    assert sent == [encode_prompt(write.tokenizer, asked)]


def answers_of(tokenizer, labels: list[int]) -> list[str]:
    text = tokenizer.decode([label for label in labels if label != IGNORED])
    return text.split(END)


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
def test_decoding_gives_the_text_back(tokenizer, edge):
    messages = chat("Who?", edge, edge, edge, system=edge)
    (encoded,) = encode(tokenizer, [messages])

    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded.completion_ids) == edge + END
    assert answers_of(tokenizer, encoded.labels)[-2] == edge


@pytest.mark.parametrize("text", CONTROL)
def test_a_control_token_in_a_text_stays_text(tokenizer, text):
    messages = chat(text, text, f"Sum up.{INPUT_MARK}{text}", text, system=text)
    (encoded,) = encode(tokenizer, [messages])
    control = set(tokenizer.added_tokens_decoder)
    shape = [token for token in encoded.input_ids if token in control]

    (plain,) = encode(tokenizer, [chat("a", "b", f"c{INPUT_MARK}d", "e", system="f")])
    assert shape == [token for token in plain.input_ids if token in control]
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded.completion_ids[:-1]) == text


def test_every_answer_is_supervised_with_its_end(tokenizer):
    messages = chat("Who ran?", "Tom ran.", "Where?", "Home.", "When?", "“Soon,” he said.", system="Be kind.")
    (encoded,) = encode(tokenizer, [messages])

    assert answers_of(tokenizer, encoded.labels) == ["Tom ran.", "Home.", "“Soon,” he said.", ""]
    assert encoded.labels.count(tokenizer.eos_token_id) == 3
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))


def test_special_tokens_alone_keep_any_answer_whole():
    """Where an answer follows a line break, one that begins with another merges with it in the next prompt."""
    supervised = {}
    for name in TEMPLATES:
        tokenizer = gpt2_with(name)
        (encoded,) = encode(tokenizer, [chat("Who?", "\n\nTom", "Where?", "Home.")])
        supervised[name] = answers_of(tokenizer, encoded.labels)[:-1]
        assert encoded.unlearned == 2 - len(supervised[name])

    assert supervised.pop("story_chat") == ["\n\nTom", "Home."]
    assert set(map(tuple, supervised.values())) == {("Home.",)}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=4))
def test_any_text_at_all(contents):
    tokenizer = gpt2_with("story_chat")
    messages = chat(*contents, *["Tom."] * (len(contents) % 2))
    (encoded,) = encode(tokenizer, [messages])

    assert encoded.prompt_ids == encode_prompt(tokenizer, messages[:-1])
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert answers_of(tokenizer, encoded.labels)[-1] == ""
    assert len(encoded.input_ids) == len(encoded.labels)


TEXTS = {
    ("story", "plain"): "Who?\n\n### Story:\n",
    ("story", "input"): "Sum up.\nTom ran.\n\n### Story:\n",
    ("alpaca", "plain"): "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nWho?\n\n### Response:\n",
    ("alpaca", "input"): "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\nSum up.\n\n### Input:\n"
    "Tom ran.\n\n### Response:\n",
    ("phi3", "plain"): "<|user|>\nWho?\n<|assistant|>\n",
    ("phi3", "input"): "<|user|>\nSum up.\nTom ran.\n<|assistant|>\n",
    ("inst", "plain"): "[INST] Who? [/INST]\n",
    ("inst", "input"): "[INST] Sum up.\nTom ran. [/INST]\n",
    ("play", "plain"): "USER:\nWho?\n\nMODEL:\n",
    ("play", "input"): "USER:\nSum up.\nTom ran.\n\nMODEL:\n",
    ("story_chat", "plain"): "<|user|>Who?<|assistant|>",
    ("story_chat", "input"): "<|user|>Sum up.\nTom ran.<|assistant|>",
}


@pytest.mark.parametrize(("name", "kind"), TEXTS, ids="-".join)
def test_a_prompt_reads_literally(name, kind):
    tokenizer = gpt2_with(name)
    asked = chat("Who?" if kind == "plain" else f"Sum up.{INPUT_MARK}Tom ran.")

    assert prompt_text(tokenizer, asked) == TEXTS[name, kind]


EXCHANGES = (
    chat("Write a story about a fox.", "A fox ran."),
    chat(f"Who ran?{INPUT_MARK}A fox ran.", "A fox.", "Where?", "Home.", system="You answer questions about stories."),
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_document_shows_the_template_as_it_is(name):
    tokenizer = gpt2_with(name)
    shown = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in EXCHANGES]

    section = f"### `{name}`\n\n" + "\n\n".join(f"```text\n{text}\n```" for text in shown)
    assert section in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_template_is_tested():
    assert {name for name, _ in TEXTS} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_brings_its_tokens_once(name):
    tokenizer = load_tokenizer("gpt2", 512)
    before = len(tokenizer)
    add_template(tokenizer, name)
    add_template(tokenizer, name)

    assert len(tokenizer) == before + len(SPECIAL_TOKENS.get(name, ()))
    assert tokenizer.chat_template == load_template(name)


def test_an_unknown_template_is_refused_with_those_there_are():
    with pytest.raises(
        UserError, match="'haiku' is unknown; choose one of alpaca, inst, phi3, play, story, story_chat"
    ):
        load_template("haiku")


LECTURE = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # the lecture's 65 characters
WRITABLE = {"play": LECTURE, "story_chat": LECTURE.replace(":", "").replace("\n", "")}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_vocabulary_of_characters_takes_the_templates_that_it_can_write(name):
    tokenizer = load_tokenizer(None, 64, {character: i for i, character in enumerate(WRITABLE.get(name, LECTURE))})
    if name not in WRITABLE:
        with pytest.raises(UserError, match=r"writes .*, which the vocabulary lacks; .* can write: play, story_chat\."):
            add_template(tokenizer, name)
        return
    add_template(tokenizer, name)
    (encoded,) = encode(tokenizer, [chat("Who", "Tom ran.")])
    assert tokenizer.decode(encoded.completion_ids) == f"Tom ran.{END}"
    assert tokenizer.decode(encoded.prompt_ids) == prompt_text(tokenizer, chat("Who"))


def test_what_a_template_writes_and_a_vocabulary_lacks_is_named():
    with pytest.raises(UserError, match=r"The template story writes '#', which the vocabulary lacks"):
        add_template(load_tokenizer(None, 64, {c: i for i, c in enumerate(LECTURE)}), "story")
    with pytest.raises(UserError, match=r"The template play writes ':', which .* what it can write: story_chat\."):
        add_template(load_tokenizer(None, 64, {c: i for i, c in enumerate(LECTURE.replace(":", ""))}), "play")
