import json
import sys

import pytest

from fledge.encoding import encode_prompt
from fledge.errors import UserError
from fledge.generation.answers import answer_each
from fledge.generation.prompts_file import read_prompts
from fledge.models import load_model
from fledge.sampling import Sampling
from fledge.scripts import generate

PROMPTS = [f"Write a story about: Lily took a kite number {n}." for n in range(7)]


@pytest.fixture
def run_file(tiny, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")

    def run(output, *arguments):
        keys = ["--model", tiny.model, "--prompts_file", prompts, "--output_file", output, "--max_new_tokens", 20]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, [*keys, "--num_samples", 2, *arguments])])
        generate.main()
        return output.read_bytes()

    return run


def test_every_prompt_is_answered_in_order(run_file, tiny, tmp_path):
    rows = [json.loads(line) for line in run_file(tmp_path / "out.jsonl").decode().splitlines()]
    assert [(row["messages"][0]["content"], row["sample"]) for row in rows] == [(p, s) for p in PROMPTS for s in (0, 1)]
    model, tokenizer = load_model(str(tiny.model))
    ids = [encode_prompt(tokenizer, row["messages"]) for row in rows]
    answers = dict(answer_each(model, tokenizer, ids, Sampling(max_new_tokens=20), 3))
    assert [row["text"] for row in rows] == [answers[i].text for i in range(14)]
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.jsonl"]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_killed_run_is_completed_to_the_same_file(run_file, tmp_path, monkeypatch, batch_size):
    whole = run_file(tmp_path / "whole.jsonl")
    made = 0

    def killed(*arguments, **keys):
        nonlocal made
        for made, answer in enumerate(answer_each(*arguments, **keys), 1):
            if made == 5:
                raise KeyboardInterrupt
            yield answer

    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with monkeypatch.context() as patched:
        patched.setattr("fledge.generation.prompts_file.answer_each", killed)
        with pytest.raises(KeyboardInterrupt):
            run_file(output, "--batch_size", batch_size)
    assert not output.exists()
    partial.write_bytes(partial.read_bytes() + b'{"i": 3, "mess')  # and half a line
    assert len(partial.read_text(encoding="utf-8").splitlines()) == 1 + 4 + 1
    assert run_file(output) == whole
    assert not partial.exists()


def test_other_settings_do_not_mix(run_file, tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text('{"--model": "another"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="made with another --model"):
        run_file(tmp_path / "out.jsonl")
    assert partial.read_text(encoding="utf-8") == '{"--model": "another"}\n'


def test_a_finished_file_is_kept(run_file, tmp_path):
    output = tmp_path / "out.jsonl"
    made = run_file(output)
    with pytest.raises(UserError, match="already there"):
        run_file(output)
    assert run_file(output, "--overwrite") == made
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"out.jsonl was not written by generate.py and will not be replaced"):
        run_file(output, "--overwrite")
    assert output.read_text(encoding="utf-8") == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "prompts.txt"}


@pytest.mark.parametrize("way", ["same", "linked", "in the model"])
def test_prompts_are_never_written_over(tmp_path, monkeypatch, way):
    prompts, output, model = tmp_path / "p.txt", tmp_path / "out.txt", tmp_path / "model"
    prompts.write_text("mine")
    model.mkdir()
    (model / "config.json").write_text("{}")
    if way == "linked":
        output.symlink_to(prompts)
    output = {"same": prompts, "linked": output, "in the model": model / "out.jsonl"}[way]
    arguments = ["--model", model, "--prompts_file", prompts, "--output_file", output, "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    with pytest.raises(UserError, match=r"--output_file .*(is --prompts_file|lies in --model) .*, which is read"):
        generate.main()
    assert prompts.read_text() == "mine"


@pytest.mark.parametrize("left", ['{"--mod', ""])
def test_a_first_line_that_was_half_written_starts_over(run_file, tmp_path, left):
    (tmp_path / "out.jsonl.partial").write_text(left, encoding="utf-8")
    assert run_file(tmp_path / "out.jsonl") == run_file(tmp_path / "again.jsonl")


def test_a_damaged_file_says_what_to_do(run_file, tmp_path):
    (tmp_path / "out.jsonl.partial").write_text("no JSON\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"is damaged; move .*out\.jsonl\.partial"):
        run_file(tmp_path / "out.jsonl")


def test_lines_of_json(tmp_path):
    file = tmp_path / "p.jsonl"
    talk = [
        {"role": "user", "content": "a\u2028b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    file.write_text(json.dumps({"prompt": "x"}) + "\n\n" + json.dumps({"messages": talk}, ensure_ascii=False), "utf-8")
    assert read_prompts(file) == [[{"role": "user", "content": "x"}], talk]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", 'n,prompt\n1,x\n2,"y, and z"\n'),
        ("p.tsv", "prompt\tn\nx\t1\ny, and z\t2\n"),
        ("p.json", '[{"prompt": "x"}, {"messages": [{"role": "user", "content": "y, and z"}]}]'),
        ("p.csv", """messages\n"[{'role': 'user', 'content': 'x'}]"\n"[{'from': 'human', 'value': 'y, and z'}]"\n"""),
    ],
)
def test_rows_of_a_table(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert [asked[-1]["content"] for asked in read_prompts(tmp_path / name)] == ["x", "y, and z"]


@pytest.mark.parametrize("content", ["prompt,n\nx,1\n,2\n", "question\nx\ny\n", 'prompt,n\nx,1\n"\u200b",2\n'])
def test_a_bad_row_is_named(tmp_path, content):
    (tmp_path / "p.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.csv, row [12], is not"):
        read_prompts(tmp_path / "p.csv")


@pytest.mark.parametrize(
    "line",
    ["x", "[]", "3", "null", "{}", '{"prompt": 3}', '{"prompt": " "}', '{"messages": []}',
     '{"messages": [{"role": "user"}]}', '{"messages": "hello"}',
     '{"messages": [{"role": "assistant", "content": "x"}]}'],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "x"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.jsonl:2(, message 1)? (is not|holds)"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("user user", "not questions and answers in turn"),
        ("assistant user", "not questions and answers in turn"),
        ("user tool user", "a tool speaks in it"),
        ("user assistant system user", "a system message stands after another message"),
    ],
)
def test_a_conversation_that_no_template_writes_is_named(tmp_path, roles, reason):
    messages = [{"role": role, "content": "x"} for role in roles.split()]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"p\.jsonl:1 is no conversation that .*: .*{reason}"):
        read_prompts(tmp_path / "p.jsonl")


def test_an_answer_that_was_not_to_be_learnt_is_still_an_answer(tmp_path):
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
    ]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": talk}), encoding="utf-8")
    assert [message["role"] for message in read_prompts(tmp_path / "p.jsonl")[0]] == ["user", "assistant", "user"]


def test_a_system_message_of_its_own_replaces_that_of_the_task(tmp_path, monkeypatch):
    own, tasks = ({"role": "system", "content": content} for content in ("own", "of the task"))
    asked = {"role": "user", "content": "Why?"}
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(json.dumps({"messages": m}) for m in ([own, asked], [asked])), encoding="utf-8")
    output.touch()
    heard = []
    monkeypatch.setattr(generate, "prompt_ids", lambda model, tokenizer, messages, room: heard.append(messages))
    monkeypatch.setattr(
        "fledge.generation.prompts_file.answer_file",
        lambda args, model, tokenizer, sampling, encode: list(map(encode, read_prompts(prompts))),
    )
    args = generate.GenerateArguments("m", prompts_file=str(prompts), output_file=str(output))
    generate.answer_prompts(args, Sampling(), (None, None), [tasks])
    assert heard == [[own, asked], [tasks, asked]]


def test_a_prompt_that_does_not_fit_is_named(run_file, tmp_path):
    (tmp_path / "prompts.txt").write_text("short\n" + "word " * 999, encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.txt, prompt 2: A prompt of \d+ tokens leaves no room"):
        run_file(tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff"])
def test_no_prompts(tmp_path, content):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"p\.txt"):
        read_prompts(file)
