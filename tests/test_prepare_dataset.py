import json
import resource
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import call_script
from datasets import ClassLabel, load_dataset, load_from_disk
from hub import TOKEN, Hub
from huggingface_hub import DatasetCard
from processes import fork_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fledge.encoding import IGNORED, encode_prompt, open_prepared, open_rows, prompt_length, prompt_text
from fledge.errors import UserError
from fledge.scripts import prepare_dataset
from fledge.tasks.topic_ending import requested
from fledge.templates import load_template
from fledge.tokenizers import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

END = "<|endoftext|>"
TOPICS = 120
SPLITS = ("train", "validation", "test")


def story(number: int, end: str = "happy") -> str:
    return f"Once there was a fox who had {number} hats. It lost one.\n\nIn the end it was {end}."


def record(summary: str | None, text: str | None, features: str = "Dialogue") -> str:
    parts = [f"Features: {features}\n"]
    parts += [f"Summary: {summary}\n"] if summary is not None else []
    parts += [f"Story: \n\n{text}\n"] if text is not None else []
    return "".join(parts) + f"{END}\n"


def corpus_text() -> str:
    """180 usable records: a happy one for each of 120 topics, a sad one for every second; and 15 others."""
    records = [record(f"A fox and {n} hats.", story(n)) for n in range(TOPICS)]
    records += [record(f"A fox and {n} hats.", story(n, "sad"), "BadEnding") for n in range(0, TOPICS, 2)]
    records += [record(None, story(n)) for n in range(3)]
    records += [record(f"A fox and {n} hats.", None) for n in range(2)]
    records += [record(f"A fox and {n} hats.", "It lost one and") for n in range(4)]
    records += records[:5]
    records += [record("A long day.", "It was a long day. " * 60)]
    return "".join(records)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A corpus, and the tokenizer of a model with a context of 128 tokens."""
    work = tmp_path_factory.mktemp("prepare")
    (work / "corpus.txt").write_text(corpus_text(), encoding="utf-8")
    save_tokenizer(work / "base", model_max_length=128)
    return work


def save_tokenizer(folder: Path, end: str | None = END, **settings) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[end] if end else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus_text()], trainer)
    settings = {"bos_token": END, "eos_token": END, "pad_token": END, "clean_up_tokenization_spaces": False} | settings
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def prepare(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_dataset.py", *map(str, arguments)])
        prepare_dataset.main()


@pytest.fixture(scope="module")
def usual(work):
    return ("--data", work / "corpus.txt", "--tokenizer", work / "base")


@pytest.fixture(scope="module")
def balanced(work, usual):
    prepare(*usual, "--balance", "ending", "--split", "80/10/10", "--seed", "1", "--output_dir", work / "balanced")
    return work / "balanced"


@pytest.fixture(scope="module")
def plain(work, usual):
    prepare(*usual, "--output_dir", work / "plain")
    return work / "plain"


def read_split(folder: Path, name: str) -> list[dict]:
    return pyarrow.parquet.read_table(folder / "data" / f"{name}-00000-of-00001.parquet").to_pylist()


def topics(folder: Path, name: str) -> set[str]:
    return {requested(row["instruction"])[0] for row in read_split(folder, name)}


def read_budget(folder: Path) -> dict:
    return json.loads((folder / "budget.json").read_text(encoding="utf-8"))


def test_the_folder_holds_what_later_stages_read(balanced):
    files = {str(path.relative_to(balanced)) for path in balanced.rglob("*") if path.is_file()}

    assert files >= {f"data/{name}-00000-of-00001.parquet" for name in SPLITS}
    assert files >= {"README.md", "budget.json", "budget.md", "budget.png", "tokenizer/tokenizer.json"}
    assert (balanced / "budget.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in balanced.parent.iterdir() if path.name.startswith(".")] == []


def test_load_dataset_opens_the_folder_as_it_is(balanced, tmp_path):
    dataset = load_dataset(str(balanced), cache_dir=str(tmp_path))

    assert tuple(dataset) == SPLITS
    for name, split in dataset.items():
        assert split.column_names == ["instruction", "response", "ending"]
        assert split.features["ending"] == ClassLabel(names=["happy", "sad"])
        assert split.to_list() == read_split(balanced, name)


def test_every_row_says_what_its_record_said(plain):
    rows = [row for name in SPLITS for row in read_split(plain, name)]
    expected = [(f"A fox and {n} hats.", "happy", story(n)) for n in range(TOPICS)]
    expected += [(f"A fox and {n} hats.", "sad", story(n, "sad")) for n in range(0, TOPICS, 2)]

    assert sorted((*requested(row["instruction"]), row["response"]) for row in rows) == sorted(expected)
    assert all(("happy", "sad")[row["ending"]] == requested(row["instruction"])[1] for row in rows)


def test_the_encoded_rows_are_the_text_rows_in_their_order(plain):
    tokenizer = AutoTokenizer.from_pretrained(plain / "tokenizer")
    tokenized = load_from_disk(str(plain / "tokenized"))

    assert tuple(tokenized) == SPLITS
    for name, split in tokenized.items():
        assert set(split.column_names) == {"input_ids", "labels"}
        text = read_split(plain, name)
        assert len(split) == len(text)
        for row, example in zip(split, text, strict=True):
            prompt = prompt_text(tokenizer, [{"role": "user", "content": example["instruction"]}])
            response = example["response"]
            supervised = [label for label in row["labels"] if label != IGNORED]
            assert tokenizer.decode(row["input_ids"]) == prompt + response + END
            assert tokenizer.decode(supervised) == response + END
            assert row["labels"] == [IGNORED] * (len(row["labels"]) - len(supervised)) + supervised


def test_rows_are_opened_with_class_names_and_prompts_end_at_answers(balanced):
    _, tokenizer, tokenized = open_prepared(balanced)

    for name, rows in open_rows(balanced).items():
        assert len(rows) == len(tokenized[name])
        for row, ids in zip(rows, tokenized[name], strict=True):
            assert row["ending"] == requested(row["messages"][0]["content"])[1]
            assert ids["input_ids"][: prompt_length(ids["labels"])] == encode_prompt(tokenizer, row["messages"][:-1])


def test_a_vocabulary_without_an_end_of_text_gets_one(work, usual, tmp_path):
    save_tokenizer(tmp_path / "endless", end=None, eos_token=None, bos_token=None, pad_token=None, model_max_length=128)
    before = AutoTokenizer.from_pretrained(tmp_path / "endless")
    prepare(*usual, "--tokenizer", tmp_path / "endless", "--output_dir", tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == (END, len(before), len(before) + 1)
    rows = load_from_disk(str(tmp_path / "out" / "tokenized"))["train"]
    assert all(row["labels"][-1] == tokenizer.eos_token_id for row in rows)


def test_the_chat_template_brings_its_tokens(usual, tmp_path):
    prepare(*usual, "--template", "story_chat", "--limit", "60", "--output_dir", tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert [user, assistant] == [len(tokenizer) - 2, len(tokenizer) - 1]
    for row in load_from_disk(str(tmp_path / "out" / "tokenized"))["train"]:
        assert row["input_ids"][0] == user
        assert row["input_ids"][prompt_length(row["labels"]) - 1] == assistant


def test_the_tokenizer_carries_the_template(plain):
    tokenizer = AutoTokenizer.from_pretrained(plain / "tokenizer")

    assert tokenizer.chat_template == load_template("story")
    assert tokenizer.model_max_length == 128


@pytest.mark.parametrize("folder", ["plain", "balanced"])
def test_no_topic_is_in_two_splits(request, folder):
    train, validation, test = (topics(request.getfixturevalue(folder), name) for name in SPLITS)

    assert not train & validation
    assert not train & test
    assert not validation & test


def test_endings_are_equally_frequent_in_every_split(balanced):
    for name in SPLITS:
        counts = Counter(row["ending"] for row in read_split(balanced, name))
        assert counts[0] == counts[1] > 0


def test_splits_are_near_their_shares(plain, balanced):
    """No topic has more than two rows, so without balancing a split misses its share by two at most."""
    for name, share in zip(SPLITS, (0.85, 0.05, 0.1), strict=True):
        assert abs(len(read_split(plain, name)) - share * 180) <= 2
    for name, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert abs(len(read_split(balanced, name)) / 120 - share) <= 0.1


def test_every_record_is_accounted_for(plain, balanced):
    reasons = {
        "no summary": 3,
        "no story": 2,
        "the story breaks off": 4,
        "an exact duplicate": 5,
        "longer than 128 tokens": 1,
    }

    assert read_budget(plain)["rows_read"] == 195
    assert read_budget(plain)["rejected"] == reasons
    assert read_budget(plain)["rows_kept"] == 180
    assert read_budget(balanced)["rows_read"] == 195
    assert read_budget(balanced)["rejected"] == {**reasons, "surplus of one ending": 60}
    assert read_budget(balanced)["rows_kept"] == 120


def test_the_budget_describes_what_was_written(balanced):
    budget = read_budget(balanced)
    facts = {name: budget[name] for name in ("source", "task", "template", "seed", "max_length", "overflow")}

    assert facts == {
        "source": "tinystories_instruct",
        "task": "topic_ending",
        "template": "story",
        "seed": 1,
        "max_length": 128,
        "overflow": "drop",
    }
    for name, split in load_from_disk(str(balanced / "tokenized")).items():
        lengths = [len(ids) for ids in split["input_ids"]]
        supervised = sum(label != IGNORED for labels in split["labels"] for label in labels)
        figures = budget["splits"][name]
        assert figures["rows"] == figures["eos_supervised"] == len(lengths)
        assert figures["cut"] == 0
        assert figures["labels"] == {"happy": len(lengths) / 2, "sad": len(lengths) / 2}
        assert figures["tokens"] == sum(lengths)
        assert figures["lengths"]["total"]["1"] == max(lengths) <= 128
        assert figures["supervised_share"] == pytest.approx(supervised / sum(lengths))


def test_the_card_is_valid_and_says_what_is_in_the_dataset(balanced):
    text = (balanced / "README.md").read_text(encoding="utf-8")
    card = DatasetCard(text)

    assert card.data.language == "en"
    assert card.data.task_categories == ["text-generation"]
    assert [
        (part["split"], [path.name for path in balanced.glob(part["path"])])
        for part in card.data.configs[0]["data_files"]
    ] == [(name, [f"{name}-00000-of-00001.parquet"]) for name in SPLITS]
    assert "120 of 195 records were kept." in text
    for name, figures in read_budget(balanced)["splits"].items():
        each = figures["rows"] // 2
        counts = f"{figures['rows']} | {figures['tokens']:,} | {figures['supervised_share']:.1%}"
        assert f"| {name} | {counts} | {each} happy, {each} sad |" in text
    for reason, count in read_budget(balanced)["rejected"].items():
        assert f"{count} ({reason})" in text
    assert read_split(balanced, "train")[0]["response"] in text
    assert str(balanced.parent) not in text


def test_the_same_seed_gives_the_same_bytes(work, usual, plain, tmp_path):
    prepare(*usual, "--output_dir", tmp_path / "again")

    for file in ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "budget.json", "README.md"):
        assert (tmp_path / "again" / file).read_bytes() == (plain / file).read_bytes()
    again, before = (load_from_disk(str(folder / "tokenized")) for folder in (tmp_path / "again", plain))
    assert again["train"].to_list() == before["train"].to_list()


def test_another_seed_gives_another_split(usual, plain, tmp_path):
    prepare(*usual, "--seed", "5", "--output_dir", tmp_path / "other")

    assert topics(tmp_path / "other", "test") != topics(plain, "test")
    assert sum(len(read_split(tmp_path / "other", name)) for name in SPLITS) == 180


def test_a_recipe_and_several_files(work, tmp_path):
    second = tmp_path / "second.txt"
    second.write_text("".join(record(f"A bear and {n} hats.", story(n)) for n in range(20)), encoding="utf-8")
    recipe = tmp_path / "prepare.yaml"
    recipe.write_text(
        f"data: [{work / 'corpus.txt'}, {second}]\ntokenizer: {work / 'base'}\nsplit: 60/20/20\n"
        f"output_dir: {tmp_path / 'other'}\n",
        encoding="utf-8",
    )
    prepare("--config", recipe, "--output_dir", tmp_path / "out")

    budget = read_budget(tmp_path / "out")
    assert (budget["rows_read"], budget["rows_kept"]) == (215, 200)
    assert abs(budget["splits"]["train"]["rows"] - 120) <= 2
    assert not (tmp_path / "other").exists()


def test_limit_reads_that_many_records(usual, tmp_path):
    prepare(*usual, "--limit", "100", "--output_dir", tmp_path / "out")

    assert (read_budget(tmp_path / "out")["rows_read"], read_budget(tmp_path / "out")["rows_kept"]) == (100, 100)


def test_rows_that_do_not_meet_only_are_left_out_and_counted(usual, plain, tmp_path):
    prepare(*usual, "--only", "ending=sad", "--output_dir", tmp_path / "out")

    budget = read_budget(tmp_path / "out")
    endings = Counter(row["ending"] for name in SPLITS for row in open_rows(plain)[name])
    assert budget["rows_kept"] == endings["sad"]
    assert budget["rejected"]["not ending=sad"] >= endings["happy"]  # some are duplicates as well
    lost = budget["rows_read"] - budget["records_used"] + budget["examples"] - budget["rows_kept"]
    assert sum(budget["rejected"].values()) == lost
    assert {row["ending"] for rows in open_rows(tmp_path / "out").values() for row in rows} == {"sad"}
    assert "--only" not in " ".join(budget["warnings"])  # it was asked for


def test_an_answer_that_is_cut_is_counted_and_does_not_end(usual, tmp_path):
    prepare(*usual, "--overflow", "cut_completion", "--output_dir", tmp_path / "out")

    budget = read_budget(tmp_path / "out")
    end = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").eos_token_id
    rows = [row for split in load_from_disk(str(tmp_path / "out" / "tokenized")).values() for row in split]
    assert budget["rows_kept"] == 181
    assert sum(split["cut"] for split in budget["splits"].values()) == 1
    assert sum(split["eos_supervised"] for split in budget["splits"].values()) == 180
    assert [len(row["labels"]) for row in rows if row["labels"][-1] != end] == [128]


@pytest.mark.parametrize("overflow", ["cut_prompt", "cut_completion"])
def test_a_cut_leaves_what_the_prompt_must_ask(usual, plain, tmp_path, overflow):
    limit = read_budget(plain)["splits"]["train"]["lengths"]["total"]["0.5"]
    prepare(*usual, "--max_length", limit, "--overflow", overflow, "--output_dir", tmp_path / "out")

    budget, rows = read_budget(tmp_path / "out"), open_rows(tmp_path / "out")
    assert all(requested(row["messages"][0]["content"]) for split in rows.values() for row in split)
    longer = {"cut_prompt": budget["rejected"].get(f"longer than {limit} tokens"), "cut_completion": None}[overflow]
    if longer:
        assert budget["remedies"] == {"--max_length 128": longer - 1, "--overflow cut_completion": longer}
        assert f"--max_length 128 would keep {longer - 1} of them" in " ".join(budget["warnings"])
        assert "--overflow cut_prompt" not in " ".join(budget["warnings"])


def test_a_question_whose_answer_was_cut_away_is_dropped_and_counted(work, tmp_path):
    passage = " ".join(f"In house {n} lived a fox with {n} hats." for n in range(12))
    asked = [("Where first?", "house 0"), ("How many last?", "11 hats")]
    rows = [
        {"story": f"s{n}", "context": f"{n}. {passage}", "question": question, "answer": answer, "attribute": "x"}
        for n in range(10)
        for question, answer in asked
    ]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = (
        "--data",
        tmp_path / "qa.jsonl",
        "--source",
        "story_qa",
        "--task",
        "instructions",
        "--template",
        "inst",
    )
    cut = ("--overflow", "cut_prompt", "--max_length", 100, "--split", "60/20/20", "--output_dir", tmp_path / "out")
    prepare("--tokenizer", work / "base", *arguments, *cut)

    budget, kept = (
        read_budget(tmp_path / "out"),
        [row for split in open_rows(tmp_path / "out").values() for row in split],
    )
    assert budget["rejected"]["its answer was cut away with the text"] == len(kept) == 10
    assert sum(split["prompts_cut"] for split in budget["splits"].values()) == len(kept)
    assert all(row["messages"][1]["content"] in row["messages"][0]["content"] for row in kept)
    assert "10 of 10 rows have a prompt that was cut to fit 100 tokens" in budget["warnings"][0]


def test_a_vocabulary_of_characters_loses_records_not_the_run(work, tmp_path):
    text = (work / "corpus.txt").read_text(encoding="utf-8")
    characters = sorted(set("\nMODELUSER:WSwrite a story about: With ending" + text) - set("|<>"))
    load_tokenizer(None, 400, {c: i for i, c in enumerate(characters)}).save_pretrained(tmp_path / "base")
    (tmp_path / "more.txt").write_text(
        text + record("A café.", "It was [closed].") + record("A é.", "It was."), "utf-8"
    )
    out = ("--output_dir", tmp_path / "out", "--split", "60/20/20")
    prepare("--data", tmp_path / "more.txt", "--tokenizer", tmp_path / "base", "--template", "play", *out)

    budget = read_budget(tmp_path / "out")
    assert budget["rejected"]["the vocabulary lacks something in it: 'é', '[', ']'"] == 2
    assert budget["rows_kept"] == 180
    with pytest.raises(UserError, match=r"The template story writes '#', .* it can write: play, story_chat\."):
        prepare("--data", tmp_path / "more.txt", "--tokenizer", tmp_path / "base", *out, "--overwrite")


def test_the_context_is_the_models_where_the_tokenizer_says_none(usual, work, tmp_path, monkeypatch):
    save_tokenizer(tmp_path / "base")
    out = (*usual, "--tokenizer", tmp_path / "base", "--output_dir", tmp_path / "out")
    with pytest.raises(UserError, match=r"base does not say how many tokens .*; name the folder of the model, or give"):
        prepare(*out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "base" / "config.json").write_text('{"n_positions": 70}')
    with pytest.raises(UserError, match="--max_length 71 is outside 1 to 70, the model's context"):
        prepare(*out, "--max_length", "71")
    prepare(*out)
    assert read_budget(tmp_path / "out")["max_length"] == 70
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").model_max_length == 70


def test_max_length_drops_what_is_longer(usual, plain, tmp_path):
    limit = read_budget(plain)["splits"]["train"]["lengths"]["total"]["0.5"]
    prepare(*usual, "--max_length", limit, "--output_dir", tmp_path / "out")

    budget = read_budget(tmp_path / "out")
    assert 1 < budget["rejected"][f"longer than {limit} tokens"] < 180
    assert budget["rows_kept"] + sum(budget["rejected"].values()) == 195
    assert max(split["lengths"]["total"]["1"] for split in budget["splits"].values()) <= limit


def test_near_duplicates_are_left_out_and_counted_when_asked(work, tmp_path):
    words = [f"w{n}" for n in range(800)]

    def records(animal: str, end: str) -> str:
        stories = (" ".join(words[n * 40 : n * 40 + 40]) for n in range(20))
        return "".join(record(f"A {animal} in house {n}.", f"{text} {end}.") for n, text in enumerate(stories))

    (tmp_path / "more.txt").write_text(records("bear", "and ran") + records("cat", "and sat"), encoding="utf-8")
    arguments = ("--data", tmp_path / "more.txt", "--tokenizer", work / "base", "--overflow", "cut_completion")
    prepare(*arguments, "--split", "60/20/20", "--output_dir", tmp_path / "kept")
    prepare(*arguments, "--split", "60/20/20", "--output_dir", tmp_path / "out", "--near_duplicates", "0.7")

    assert read_budget(tmp_path / "kept")["rejected"] == {}
    assert read_budget(tmp_path / "out")["rejected"] == {"a near duplicate": 20}
    assert all(topic.startswith("A bear") for name in SPLITS for topic in topics(tmp_path / "out", name))


def test_endings_that_are_in_balance_lose_nothing(work, tmp_path):
    pairs = "".join(
        record(f"A bear and {n} hats.", story(n, end), features)
        for n in range(60)
        for end, features in (("happy", "Twist"), ("sad", "BadEnding"))
    )
    (tmp_path / "pairs.txt").write_text(pairs, encoding="utf-8")
    prepare(
        *("--data", tmp_path / "pairs.txt", "--tokenizer", work / "base"),
        *("--balance", "ending", "--output_dir", tmp_path / "out"),
    )

    assert read_budget(tmp_path / "out")["rejected"] == {}
    assert "Left out: nothing." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_overwrite_replaces_an_earlier_dataset_and_nothing_else(usual, tmp_path):
    prepare(*usual, "--output_dir", tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="already has content"):
        prepare(*usual, "--output_dir", tmp_path / "out")
    with pytest.raises(UserError, match=r"out/thesis.txt was not written by prepare_dataset.py"):
        prepare(*usual, "--overwrite", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"

    (tmp_path / "out" / "thesis.txt").unlink()
    prepare(*usual, "--seed", "3", "--overwrite", "--output_dir", tmp_path / "out")
    assert read_budget(tmp_path / "out")["seed"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_person_runs_it_and_reads_the_report(usual, tmp_path):
    done = call_script("prepare_dataset.py", *usual, "--balance", "ending", "--output_dir", tmp_path / "out")

    assert "Read 195 records: 186 examples." in done.stdout
    assert "| no summary | 3 |" in done.stdout
    assert "| longer than 128 tokens | 1 |" in done.stdout
    assert f"{tmp_path / 'out'} is ready" in done.stdout
    assert "longer than the specified maximum sequence length" not in done.stderr
    assert (tmp_path / "out" / "budget.md").read_text(encoding="utf-8") in done.stdout


def test_splits_of_the_source_are_kept_and_held_out_topics_leave_train(work, tmp_path):
    texts = {
        "train": [record(f"A fox and {n} hats.", story(n)) for n in range(20)],
        "valid": [record(f"A bear and {n} hats.", story(n)) for n in range(6)]
        + [record("A fox and 3 hats.", story(3)), record("A fox and 4 hats.", story(4, "sad"), "BadEnding")],
    }
    for name, records in texts.items():
        (tmp_path / f"{name}.txt").write_text("".join(records))
    prepare(
        *("--data", tmp_path / "train.txt", tmp_path / "valid.txt", "--tokenizer", work / "base"),
        *("--split", "source", "--output_dir", tmp_path / "out"),
    )

    budget = read_budget(tmp_path / "out")
    assert {name: split["rows"] for name, split in budget["splits"].items()} == {"train": 18, "validation": 8}
    assert budget["rejected"] == {"its topic or story is held out in another split": 2}
    assert set(load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))) == {"train", "validation"}
    assert not topics(tmp_path / "out", "train") & topics(tmp_path / "out", "validation")
    assert {"A fox and 3 hats.", "A fox and 4 hats."} <= topics(tmp_path / "out", "validation")


def test_the_splits_of_a_source_that_names_none_are_refused(usual, tmp_path):
    with pytest.raises(UserError, match="--split source needs data whose files or Hub splits are named"):
        prepare(*usual, "--split", "source", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "written"), [([], "cdla-sharing-1.0"), (["--license", "apache-2.0"], "apache-2.0")])
def test_the_card_names_a_licence(usual, tmp_path, given, written):
    prepare(*usual, *given, "--limit", "60", "--output_dir", tmp_path / "out")

    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == written
    assert f"`{written}`" in card.text


def test_the_card_shows_the_schema_the_template_and_real_rows(plain):
    text = (plain / "README.md").read_text(encoding="utf-8")
    rows = read_split(plain, "train")[:2]

    assert "| `ending` | a class: happy, sad |" in text
    assert "for the template `story`, under which a row is at most 128 tokens long" in text
    assert f"```text\n{rows[0]['instruction']}\n\n### Story:\n\n```" in text
    for row in rows:
        for role, column in (("user", "instruction"), ("assistant", "response")):
            assert f"{role}:\n\n```text\n{row[column]}\n```" in text


def test_show_prints_rows_with_what_is_supervised_marked(usual, tmp_path, capsys):
    prepare(*usual, "--show", "3", "--output_dir", tmp_path / "out")

    shown = capsys.readouterr().out.split("--- row ")[1:]
    assert len(shown) == 3
    for text, row in zip(shown, read_split(tmp_path / "out", "train"), strict=False):
        assert f"{row['instruction']}\n\n### Story:\n[[{row['response']}{END}]]" in text


def test_messages_of_a_table_go_all_the_way(work, tmp_path):
    """`topic_ending` reads the fields of a table's rows as it does those of a text."""
    rows = [{"text": text} for text in corpus_text().replace(END, "").split("Features: ")[1:]]
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": "Features: " + row["text"]}) + "\n" for row in rows)
    prepare("--data", tmp_path / "rows.jsonl", "--tokenizer", work / "base", "--output_dir", tmp_path / "out")

    assert (read_budget(tmp_path / "out")["rows_read"], read_budget(tmp_path / "out")["rows_kept"]) == (195, 180)


def test_a_full_disk_leaves_nothing(usual, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"out cannot be written: .*File too large"):
            prepare(*usual, "--num_proc", "1", "--output_dir", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_the_old_dataset_and_the_next_completes(usual, plain, tmp_path):
    prepare(*usual, "--seed", "7", "--output_dir", tmp_path / "out")
    before = (tmp_path / "out" / "budget.json").read_bytes()
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, fledge.preparation.shards, prepare_dataset\n"
        "fledge.preparation.shards.write_splits = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare_dataset.main()\n"
    )
    done = fork_script(script, *usual, "--overwrite", "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == -9
    assert (tmp_path / "out" / "budget.json").read_bytes() == before

    prepare(*usual, "--overwrite", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "budget.json").read_bytes() == (plain / "budget.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "killed.py"}


STREAMED = """
from fledge.sources import load_source
source = load_source("columns", "instruction=instruction,response=response")
for chunk in source.chunks("someone/tales"):
    print(chunk.split, len(source.parse(chunk)), source.parse(chunk)[0]["instruction"].split()[0])
"""


def test_what_is_sent_to_the_hub_is_streamed_back_from_it(usual, tmp_path):
    hub = Hub()
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    try:
        done = fork_script(
            "prepare_dataset.py", *usual, "--push_to_hub", "someone/tales", "--output_dir", tmp_path / "out",
            HF_TOKEN=TOKEN, **online,
        )  # fmt: skip
        streamed = fork_script("-c", STREAMED, **online).stdout.splitlines()
    finally:
        hub.shutdown()
        hub.server_close()

    assert f"Sent to {hub.url}/datasets/someone/tales" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    splits = read_budget(tmp_path / "out")["splits"]
    assert streamed == [f"{name} {split['rows']} Write" for name, split in splits.items()]


def test_a_hub_that_cannot_be_reached_leaves_the_dataset_here(usual, tmp_path):
    done = fork_script(
        "prepare_dataset.py", *usual, "--push_to_hub", "someone/tales", "--output_dir", tmp_path / "out",
        check=False, HF_TOKEN="", HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert read_budget(tmp_path / "out")["rows_kept"] == 180


def test_a_person_who_errs_reads_one_line(usual, tmp_path):
    done = fork_script(
        "prepare_dataset.py", *usual, "--data", tmp_path / "none.txt", "--output_dir", tmp_path / "out", check=False
    )

    assert done.returncode == 2
    assert done.stderr == f"prepare_dataset.py: There is no data file at {tmp_path / 'none.txt'}.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--data", "none.txt"], "There is no data file at none.txt", id="missing file"),
        pytest.param(["--data", "empty.txt"], "empty.txt is empty", id="empty file"),
        pytest.param(
            ["--data", "broken.txt"],
            r"No record of broken.txt can be used \(no summary: 2, the story breaks off: 1\)",
            id="no complete record",
        ),
        pytest.param(
            ["--max_length", "10"], r"No record .* \(longer than 10 tokens: 186, .*no summary: 3", id="all too long"
        ),
        pytest.param(
            ["--limit", "2"], r"The test split is empty: the 2 usable records have 2 groups", id="too few to split"
        ),
        pytest.param(["--limit", "100", "--balance", "ending"], "have the ending happy, so --bal", id="one ending"),
        pytest.param(["--source", "novels"], "'novels' is unknown; choose one of alpaca", id="source"),
        pytest.param(["--task", "poem"], "'poem' is unknown; choose one of constraints", id="task"),
        pytest.param(["--template", "haiku"], "'haiku' is unknown; choose one of alpaca, inst,", id="template"),
        pytest.param(["--balance", "length"], "--balance length is no column .* has ending", id="balance"),
        pytest.param(["--only", "sad"], "--only sad is no COLUMN=VALUE; .* has the columns ending", id="no condition"),
        pytest.param(["--only", "ending=odd"], "No row can meet --only ending=odd; ending is happy", id="no label"),
        pytest.param(["--overflow", "fold"], "--overflow fold is unknown; choose one of drop,", id="overflow"),
        pytest.param(["--max_length", "129"], "--max_length 129 is outside 1 to 128", id="above the context"),
        pytest.param(["--max_length", "-1"], "--max_length -1 is out of range", id="negative length"),
        pytest.param(["--max_length", "0"], "--max_length 0 is out of range", id="no length"),
        pytest.param(["--limit", "-1"], "--limit", id="negative limit"),
        pytest.param(["--push_to_hub", "tales"], "--push_to_hub tales is not of the form user/name", id="no owner"),
        pytest.param(["--show", "-1"], "--show -1 is out of range", id="negative show"),
        pytest.param(["--data", "latin.txt"], "latin.txt is not UTF-8 text: byte 16 cannot", id="not UTF-8"),
        pytest.param(["--source", "alpaca"], "corpus.txt is no table", id="a text for a table"),
        pytest.param(["--source", "columns"], "--columns is missing", id="no columns named"),
        pytest.param(["--columns", "messages=chat"], "--columns goes with --source columns", id="columns of another"),
        pytest.param(["--tokenizer", "nowhere"], "There is no tokenizer at nowhere", id="no tokenizer folder"),
        pytest.param(["--tokenizer", "void"], "void has no tokenizer.json", id="folder without a tokenizer"),
        pytest.param(["--tokenizer", "damaged"], "damaged", id="damaged tokenizer"),
        pytest.param(["--near_duplicates", "80"], "--near_duplicates 80.0 is out of range", id="similarity"),
        pytest.param(["--num_proc", "0"], "--num_proc 0 is out of range", id="no process"),
        pytest.param(["--max_shard_size", "big"], "--max_shard_size big is no size", id="size"),
        pytest.param(["--seed", "one"], "--seed: invalid int value: 'one'", id="seed"),
        pytest.param(["--config", "number.yaml"], "--split 85 ", id="a number as the recipe's split"),
        pytest.param(["--split", "85/5"], "--split 85/5 is not three percentages", id="split"),
    ],
)
def test_a_mistake_is_refused_and_nothing_is_written(usual, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"Summary: Caf\xc3\xa9 d\xe9j\xe0.\n")
    Path("number.yaml").write_text("split: 85\n")
    Path("broken.txt").write_text(record(None, story(1)) + record(None, story(2)) + record("A fox.", "It lost one and"))
    Path("void").mkdir()
    Path("damaged").mkdir()
    Path("damaged/tokenizer.json").write_text('{"version": "1.0"}')

    with pytest.raises(UserError, match=message):
        prepare(*usual, "--output_dir", "out", *arguments)
    assert not Path("out").exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_with_other_content_is_left_alone(usual, tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(UserError, match=str(tmp_path)):
        prepare(*usual, "--output_dir", tmp_path, *overwrite)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.txt", "mine")]
