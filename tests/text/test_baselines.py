from fledge.messages import INPUT_MARK
from fledge.text.baselines import BASELINES


def row(kind: str, *said: str) -> dict:
    roles = ["user", "assistant"] * len(said)
    return {"kind": kind, "messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]}


def answers(name: str, rows: list[dict], train_rows: list[dict]) -> list[str]:
    return BASELINES[name].answers(rows, train_rows, lambda row: row["kind"])


def test_the_most_frequent_answer_is_that_of_the_same_kind():
    train = [
        row("who", "Who?", "Tim."),
        *[row("who", "Who is it?", "Lily.")] * 2,
        *[row("happy", "Happy?", "Yes.")] * 9,
    ]
    asked = [row("who", "Who?", "Ben."), row("happy", "Happy?", "No."), row("new", "What?", "A cat.")]
    assert answers("most_frequent_answer", asked, train) == ["Lily.", "Yes.", ""]


def test_the_first_sentence_is_that_of_the_text_in_question():
    story = "Tom had a very big dog. It ran away."
    given = row("sum", f"Sum it up.{INPUT_MARK}{story}", "A dog ran.")
    written = row("sum", "Write a story.", story, "Sum it up.", "A dog ran.")
    bare = row("sum", "Write a story. Make it short.", story)
    assert answers("first_sentence", [given, written, bare], []) == ["Tom had a very big dog."] * 2 + ["Write a story."]


def test_the_copied_prompt_is_the_last_one():
    assert answers("copied_prompt", [row("sum", "Write a story.", "Tom.", "Sum it up.", "Tom.")], []) == ["Sum it up."]
