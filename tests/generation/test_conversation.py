import io
import json
import sys

import pytest
from conftest import ROOT

from fledge.cli import UserError
from fledge.encoding import encode_prompt
from fledge.generation.conversation import fit_beginning, fit_prompt
from fledge.messages import INPUT_MARK
from fledge.models import load_model
from fledge.scripts import generate
from fledge.templates import add_template
from fledge.tokenizers import load_tokenizer


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


def test_a_conversation_in_the_terminal(tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "talk.jsonl"
    typed = [
        "/retry", "Write a story about: Lily took a ball.", "/retry", "Go on.",
        f"/save {file}", "/save", "/sing", "/help", "/reset", "/retry", "/quit", "never read",
    ]  # fmt: skip
    run_generate(
        monkeypatch, "--model", tiny.model, "--interactive", "--max_new_tokens", 12, "--stats", typed="\n".join(typed)
    )
    shown = capsys.readouterr()
    (talk,) = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert [message["role"] for message in talk["messages"]] == ["user", "assistant"] * 2
    assert [talk["messages"][i]["content"] for i in (0, 2)] == [typed[1], typed[3]]
    assert shown.err.count("tokens/s") == 3
    assert shown.out.count("no message yet to answer again") == 2
    assert "/sing is unknown" in shown.out
    assert "never read" not in shown.out
    for message in talk["messages"][1::2]:
        assert message["content"] in shown.out


def test_history_is_cut_and_said(tiny, monkeypatch, capsys):
    typed = "\n".join(["Lily took a kite to the park and saw a fish and a drum and a cake."] * 5)
    run_generate(monkeypatch, "--model", tiny.model, "--interactive", "--max_new_tokens", 30, typed=typed)
    assert "turns were left out" in capsys.readouterr().err


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
        with pytest.raises(UserError, match=r"--story .* cannot be read"):
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
