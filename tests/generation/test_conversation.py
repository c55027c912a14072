import io
import json
import sys

import pytest
from conftest import ROOT

from fledge.encoding import encode_prompt
from fledge.errors import UserError
from fledge.generation.conversation import Session
from fledge.generation.fitting import fit_beginning, fit_prompt
from fledge.messages import INPUT_MARK, Answer
from fledge.models import load_model
from fledge.scripts import generate
from fledge.templates import add_template
from fledge.tokenizers import load_tokenizer
from fledge.trained import Trained


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_model(str(tiny.model))[1]


def test_what_fits_is_sent_as_it_is(tokenizer):
    messages = [user("Lily had a ball."), assistant("She did."), user("And then?")]
    assert fit_prompt(tokenizer, messages, 128, 32) == (encode_prompt(tokenizer, messages), "")


def test_the_oldest_turns_go_first_and_whole(tokenizer):
    system = {"role": "system", "content": "You tell stories."}
    turns = [message for n in range(6) for message in (user(f"Lily saw number {n}."), assistant("Tim had a kite."))]
    last = user("Who saw it?")
    whole = len(encode_prompt(tokenizer, [system, *turns, last]))
    room = len(encode_prompt(tokenizer, [system, *turns[8:], last]))
    assert room < whole
    ids, said = fit_prompt(tokenizer, [system, *turns, last], room + 10, 10)
    assert ids == encode_prompt(tokenizer, [system, *turns[8:], last])
    assert "the oldest 4 of 7 turns were left out" in said


@pytest.mark.parametrize("room", [30, 40, 61])
def test_a_text_loses_its_end_and_the_question_nothing(tokenizer, room):
    text = " ".join(f"Lily saw number {n}." for n in range(40))
    ids, said = fit_prompt(tokenizer, [user(f"Who is it about?{INPUT_MARK}{text}")], room + 8, 8)
    assert len(ids) <= room
    # The next word would not have fitted.
    words = text.split()
    count = len(words) - int(said.split("the last ")[1].split()[0])
    longer = " ".join(words[: count + 1])
    assert ids == encode_prompt(tokenizer, [user(f"Who is it about?{INPUT_MARK}{' '.join(words[:count])}")])
    assert len(encode_prompt(tokenizer, [user(f"Who is it about?{INPUT_MARK}{longer}")])) > room
    assert tokenizer.decode(ids).startswith("Who is it about?\n")


def test_a_question_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(UserError, match="leaves no room in the model's context of 20"):
        fit_prompt(tokenizer, [user("Lily had a ball. " * 20)], 20, 5)
    with pytest.raises(UserError, match="The prompt is empty"):
        fit_prompt(tokenizer, [user(" \n")], 20, 5)


def test_a_beginning_loses_its_beginning(tokenizer):
    text = " ".join(f"Lily saw number {n}." for n in range(40))
    ids, said = fit_beginning(tokenizer, text, 64, 100)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *whole[-47:]]
    assert f"the first {len(whole) - 47} of {len(whole)} tokens were left out" in said
    with pytest.raises(UserError, match="empty"):
        fit_beginning(tokenizer, "", 64, 100)


def run_generate(monkeypatch, *arguments, typed: str = "") -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    generate.main()


def test_a_task_with_fields_asks_for_them(tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "asked.jsonl"
    typed = [
        "/retry", "Lily took a  ball.", "odd", "", f"/save {file}", "/ending sad", f"/save {file}", "/both",
        "/reset", "/sing", "/help", "/ending odd", "A cat.", "sad", f"/save {file}", "/save", "/quit", "never read",
    ]  # fmt: skip
    run_generate(
        monkeypatch, "--model", tiny.model, "--interactive", "--max_new_tokens", 12, "--stats", typed="\n".join(typed)
    )
    shown = capsys.readouterr()
    saved = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert [messages[0]["content"] for messages in saved] == [
        "Write a story about: Lily took a ball.\nWith: happy ending",
        "Write a story about: Lily took a ball.\nWith: sad ending",
        "Write a story about: A cat.\nWith: sad ending",
    ]
    assert all([message["role"] for message in messages] == ["user", "assistant"] for messages in saved)
    assert all(messages[1]["content"] in shown.out for messages in saved)
    assert shown.err.count("tokens/s") == 5
    for said in (
        "Type topic and ending", "There is no prompt yet", "ending is one of happy, sad", "--- happy\n", "--- sad\n",
        "/reset is unknown", "/sing is unknown", "/both ", "/ending takes one of happy, sad", "/save needs a file",
    ):  # fmt: skip
        assert said in shown.out
    assert "never read" not in shown.out


@pytest.fixture
def asked():
    """A session of a task, in which an answer says how many messages it was given, and the list of what was asked."""
    heard = []

    def answer(messages, seed):
        heard.append([message["content"] for message in messages])
        return Answer(f"answer {len(heard)}", 3, True)

    def start(**about):
        return Session(Trained("t", **{"asks_once": False, "example": []} | about), answer)

    start.heard = heard
    return start


def test_a_conversation_has_its_history_and_a_single_prompt_has_none(asked, tmp_path):
    talk = asked()
    assert talk.prompt == "> "
    for line in ("one", "two", "/retry", "/reset", "three"):
        talk.take(line)
    assert asked.heard == [["one"], ["one", "answer 1", "two"], ["one", "answer 1", "two"], ["three"]]
    once = asked(asks_once=True)
    asked.heard.clear()
    for line in ("one", "", "two"):
        once.take(line)
    assert asked.heard == [["one"], ["two"]]
    assert "/reset" not in once.commands
    once.take("/quit")
    assert once.is_over


def test_a_story_is_given_once_and_then_asked_about(asked, tmp_path):
    file = tmp_path / "tale.txt"
    file.write_text("A fox ran.\n", encoding="utf-8-sig")  # as Windows writes it
    long = " ".join(["A cat sat."] * 500)  # longer than the name of a file can be
    talk = asked(text="story")
    assert talk.prompt == "story> "
    for line in (str(file), "Who?", "Why?", f"/story {long}", "Who?", "/story", "Tell one."):
        talk.take(line)
    assert asked.heard == [
        [f"Who?{INPUT_MARK}A fox ran."],
        [f"Who?{INPUT_MARK}A fox ran.", "answer 1", "Why?"],
        [f"Who?{INPUT_MARK}{long}"],
        ["Tell one."],
    ]
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8 text: byte 0 cannot be decoded"):
        talk.take(f"/story {file}")


def test_ctrl_c_clears_the_line_and_twice_leaves(tiny, monkeypatch, capsys):
    typed = iter(["A cat.", KeyboardInterrupt, "A dog.", "happy", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def press(prompt=""):
        key = next(typed)
        if key is KeyboardInterrupt:
            raise key
        return key

    monkeypatch.setattr("builtins.input", press)
    run_generate(monkeypatch, "--model", tiny.model, "--interactive", "--max_new_tokens", 3, "--stats")
    shown = capsys.readouterr()
    assert shown.out.count("(Ctrl-C again leaves)") == 2
    assert shown.err.count("tokens/s") == 1  # the cat's ending was never asked for
    assert next(typed) == "never"


def test_the_text_stays_when_the_question_that_brought_it_goes(tokenizer):
    text = "Lily had a ball."
    turns = [user(f"Who had number 0?{INPUT_MARK}{text}"), assistant("Lily.")]
    turns += [message for n in range(1, 6) for message in (user(f"Who had number {n}?"), assistant("Tim had a kite."))]
    last = [user("Who saw it?")]
    for left in (last, [user("Who had number 5?"), assistant("Tim had a kite."), *last]):
        expected = [{**left[0], "content": f"{left[0]['content']}{INPUT_MARK}{text}"}, *left[1:]]
        room = len(encode_prompt(tokenizer, expected))
        ids, said = fit_prompt(tokenizer, [*turns, *last], room + 10, 10)
        assert ids == encode_prompt(tokenizer, expected)
        assert "turns were left out" in said


def test_two_models_side_by_side(tiny, monkeypatch, capsys):
    topic = ["--topic", "Lily took a ball to the park number 3.", "--temperature", 0, "--max_new_tokens", 30]
    monkeypatch.setenv("COLUMNS", "120")
    run_generate(monkeypatch, "--model", tiny.model, *topic)
    alone = capsys.readouterr().out.split()
    run_generate(monkeypatch, "--model", tiny.model, "--compare", tiny.base, *topic)
    columns = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert " ".join(left for left, _ in columns[2:]).split() == alone
    assert " ".join(right for _, right in columns[2:]).split() != alone
    monkeypatch.setenv("COLUMNS", "50")
    run_generate(monkeypatch, "--model", tiny.model, "--compare", tiny.model, *topic)
    below = capsys.readouterr().out.split(f"--- {tiny.model}")
    assert below[1].split() == below[2].split() == alone


def test_half_precision_answers_too(tiny, monkeypatch, capsys):
    topic = ["--topic", "Lily took a ball.", "--temperature", 0, "--max_new_tokens", 6]
    run_generate(monkeypatch, "--model", tiny.model, *topic, "--dtype", "bfloat16")
    assert capsys.readouterr().out.strip()


def test_another_task_is_warned_of(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny.model.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    budget = json.loads((folder / "budget.json").read_text(encoding="utf-8")) | {"task": "story_chat"}
    (folder / "budget.json").unlink()
    (folder / "budget.json").write_text(json.dumps(budget), encoding="utf-8")
    run_generate(monkeypatch, "--model", folder, "--topic", "A cat.", "--max_new_tokens", 2)
    assert "was trained on the task story_chat" in capsys.readouterr().err


def test_words_and_stories_are_asked_as_the_task_does(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("Lily had a ball.\n", encoding="utf-8")
    args = generate.GenerateArguments(model="m", ask="Who is it?", story=str(story))
    assert generate.question(args) == f"Who is it?{INPUT_MARK}Lily had a ball."
    words = generate.GenerateArguments(model="m", words="boat,  brave ,laugh")
    assert generate.question(words) == "Write a story using these words: boat, brave, laugh"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "Nothing is asked"),
        ({"prompt": "x", "topic": "y"}, "--prompt and --topic are given"),
        ({"topic": "x", "ending": "odd"}, "--ending odd"),
        ({"prompt": "x", "num_samples": 0}, "at least 1"),
        ({"prompt": "x", "dtype": "int8"}, "--dtype int8"),
        ({"prompt": "x", "story": "s.txt"}, "--story needs a question"),
        ({"prompts_file": "p.txt"}, "go together"),
        ({"prompt": "x", "output_file": "o"}, "go together"),
        ({"interactive": True, "compare": "m"}, "--compare"),
        ({"interactive": True, "num_samples": 2}, "--interactive has /retry"),
        ({"topic": " \u200b"}, "--topic holds no word"),
        ({"words": " , "}, "--words holds no word"),
        ({"ask": "  "}, "--ask holds no word"),
    ],
)
def test_keys_that_contradict_each_other(keys, message):
    with pytest.raises(UserError, match=message):
        generate.check(generate.GenerateArguments(model="m", **keys))


def test_a_base_model_cannot_converse(tiny, monkeypatch):
    with pytest.raises(UserError, match="without a chat template"):
        run_generate(monkeypatch, "--model", tiny.base, "--interactive")


def test_a_story_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "nowhere", ROOT):
        with pytest.raises(UserError, match=f"^{path} cannot be read"):
            generate.question(generate.GenerateArguments(model="m", ask="Who?", story=str(path)))


def test_a_character_that_the_vocabulary_lacks_is_named():
    tokenizer = load_tokenizer(None, 64, {character: i for i, character in enumerate("\nABDELMORSU:abc")})
    add_template(tokenizer, "play")
    for ask in (
        lambda text: fit_prompt(tokenizer, [{"role": "user", "content": text}], 64, 8),
        lambda text: fit_beginning(tokenizer, text, 64, 8),
    ):
        assert ask("abc")[0]
        with pytest.raises(UserError, match=r"The prompt has '#', 'é', which the model's vocabulary lacks"):
            ask("abé#")


def test_a_part_of_the_prompt_that_the_model_sees_as_unknown_is_said():
    vocabulary = ["<unk>", *"\nABDELMORSU:abc"]
    tokenizer = load_tokenizer(None, 64, {character: i for i, character in enumerate(vocabulary)})
    add_template(tokenizer, "play")
    for ask in (
        lambda text: fit_prompt(tokenizer, [{"role": "user", "content": text}], 64, 8),
        lambda text: fit_beginning(tokenizer, text, 64, 8),
    ):
        assert ask("abc")[1] == ""
        assert ask("abé")[1] == "The vocabulary lacks a part of the prompt, which the model sees as <unk>."
