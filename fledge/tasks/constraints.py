"""Constraints: write a story that keeps one to three constraints that rules can check.

The kinds are those of IFEval (Zhou et al. 2023, https://arxiv.org/abs/2311.07911), adapted to children's stories. Each
instruction is made from a story that keeps its constraints, and `fledge.text.checks` checks the answers. In the column
`constraints`, in `generate.py --constraints` and in this file, a constraint is written "kind: value".
"""

import hashlib
import random
from dataclasses import replace
from typing import Any

from fledge.errors import UserError
from fledge.messages import Answer, Messages
from fledge.tasks import RejectedRecord, Task
from fledge.text import checks
from fledge.text.baselines import BASELINES
from fledge.text.constraint_kinds import KINDS, RHYME, TITLE, Told
from fledge.text.stories import COMPLETE

OPENINGS = ("Write a short story.", "Tell me a short story.", "Write a story for children.")


def parse(constraint: str) -> tuple[str, str]:
    """ "kind: value" → kind and value.

    Raises:
        UserError: there is no such kind, or it does not take this value.
    """
    name, _, value = (part.strip() for part in constraint.partition(":"))
    if name not in KINDS:
        raise UserError(f"The constraint {constraint!r} is of no kind; write 'kind: value', one of {', '.join(KINDS)}.")
    kind = KINDS[name]
    if not (checkable := kind.read(value)):
        raise UserError(f"The constraint {constraint!r} has no value that can be checked; give {name} {kind.wanted}.")
    return name, checkable


def instruction(constraints: list[str], rng: random.Random | None = None) -> str:
    """The prompt for a story that keeps `constraints`, one per line; with plain phrasings if there is no `rng`.

    Raises:
        UserError: see `parse`; or one kind is given twice.
    """
    choose = rng.choice if rng else lambda phrasings: phrasings[0]
    parsed = [parse(constraint) for constraint in constraints]
    if len({name for name, _ in parsed}) < len(parsed):
        raise UserError(f"A kind of constraint is given twice in {', '.join(constraints)}; give each once.")
    lines = [choose(OPENINGS)]
    for name, value in parsed:
        phrasings = KINDS[name].phrasings
        lines.append(choose(phrasings.get(value) or phrasings[""]).format(KINDS[name].spelled(value)))
    return "\n".join(lines)


class Constraints(Task):
    """Each story gives three instructions, with one, two and three constraints, all in one split."""

    template = "story"
    purpose = "write short stories that keep the constraints of their prompt"
    example: Messages = [{"role": "user", "content": instruction(["words: boat, brave", "question: yes"])}]
    columns = {"number": ("one", "two", "three"), "constraints": "strings"}
    meaning = {
        "instruction_following": "keeps every constraint of its prompt, is a story in form, and stopped by end-of-text",
        "all_kept": "keeps every constraint of its prompt (IFEval's prompt-level strict accuracy, Zhou et al. 2023)",
        "kept": "share of the prompt's constraints that are kept (IFEval's instruction-level strict accuracy, each "
        "prompt weighing the same)",
        "story": "three different sentences of three words or more, no list, no copy of the prompt, no repetition",
        **{name: kind.meaning for name, kind in KINDS.items()},
        **{f"{name}_kept": f"{name}: exactly as requested" for name, kind in KINDS.items() if kind.is_share},
    }
    constraints = {"story": 1.0, **dict.fromkeys(KINDS, 1.0)}
    rewards = {"story": 1.0, "all_kept": 1.0, **dict.fromkeys(KINDS, 1.0)}
    asks_once = True
    baselines = {name: BASELINES[name] for name in ("most_frequent_answer", "copied_prompt")}

    def kind(self, row: dict[str, Any]) -> str:
        return row["number"]

    def examples(self, record: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
        """A TinyStories-Instruct record → three rows, fewer if the story keeps few constraints.

        Raises:
            RejectedRecord: the record has no story, or its story breaks off or has fewer than three sentences.
        """
        story = record.get("Story", "").strip()
        if not story:
            raise RejectedRecord("no story")
        if not story.endswith(COMPLETE):
            raise RejectedRecord("the story breaks off")
        if not checks.tells(story, ""):
            raise RejectedRecord("fewer than three whole sentences")
        group = hashlib.blake2b(" ".join(story.split()).encode(), digest_size=16).hexdigest()
        told, rows = Told.of(record, story), []
        offers = _offers(told, rng)
        for count, number in enumerate(self.columns["number"], 1):
            constraints, answer = _draw(told, offers, count, rng)
            messages = [
                {"role": "user", "content": instruction(constraints, rng)},
                {"role": "assistant", "content": answer},
            ]
            row = {"messages": messages, "number": number, "constraints": constraints, "group": group}
            # The prompt may quote so much of a very short story that the story counts as a copy of it.
            if len(constraints) == count and self._is_kept(row):
                rows.append(row)
        if not rows:
            raise RejectedRecord("it keeps no constraint that can be asked for")
        return rows

    def _is_kept(self, row: dict[str, Any]) -> bool:
        scores = self.score(row, Answer(row["messages"][-1]["content"], tokens=0, stopped=True))
        return bool(scores["all_kept"] and scores["story"])

    def score(self, row: dict[str, Any], answer: Answer) -> dict[str, float]:
        wanted, text = dict(map(parse, row["constraints"])), answer.text
        body, least = _body(text, wanted), min(3, int(wanted.get("sentences", 3)))
        shares = {
            name: KINDS[name].check(value, text if KINDS[name].reads_title else body) for name, value in wanted.items()
        }
        kept = {name: float(share == 1) for name, share in shares.items()}
        return {
            "all_kept": float(all(kept.values())),
            "kept": sum(kept.values()) / len(kept),
            "story": float(checks.tells(body, row["messages"][-2]["content"], least)),
            **shares,
            **{f"{name}_kept": kept[name] for name in KINDS if name in kept and KINDS[name].is_share},
        }

    def reward(self, row: dict[str, Any], answer: Answer) -> dict[str, float]:
        """As `score`, but each kind has a reward of its own, and `all_kept` needs a story."""
        scores, wanted = self.score(row, answer), dict(map(parse, row["constraints"]))
        body, prompt = _body(answer.text, wanted), row["messages"][-2]["content"]
        found = {name: KINDS[name].reward(value, scores[name], body, prompt) for name, value in wanted.items()}
        all_kept = scores["story"] * all(reward == 1 for reward in found.values())
        return {"story": scores["story"], "all_kept": all_kept} | found


def _body(text: str, wanted: dict[str, str]) -> str:
    """The text below the title, where one is asked for."""
    return checks.title_and_body(text)[1] if "title" in wanted else text


def _offers(told: Told, rng: random.Random) -> dict[str, str]:
    """The constraints that may be asked of a story, kind → value."""
    # The order of the draws is part of what a seed means: every value is drawn first, that of length before the others.
    values = {name: KINDS[name].offer(told, rng) for name in sorted(KINDS, key=lambda name: name != "length")}
    return {name: values[name] for name in KINDS if values[name] and KINDS[name].may_ask(values[name], told, rng)}


def _draw(told: Told, offers: dict[str, str], count: int, rng: random.Random) -> tuple[list[str], str]:
    """Up to `count` constraints in random order, and the story that keeps them all."""
    chosen: dict[str, str] = {}
    title = ""
    if RHYME.check("yes", told.story):
        chosen["rhyme"] = "yes"
    elif rng.random() < count * RHYME.added:
        chosen["rhyme"] = "yes"
        told = replace(told, story=RHYME.closed(told, rng))
        offers = _offers(told, rng)
    if len(chosen) < count and rng.random() < count * TITLE.added and (title := TITLE.made(told, rng)):
        chosen["title"] = rng.choice(("any", title))
    while len(chosen) < count and (left := [name for name in offers if not _excluded(name, chosen)]):
        name = rng.choices(left, [KINDS[name].weight for name in left])[0]
        chosen[name] = offers[name]
    lines = [f"{name}: {value}" for name, value in chosen.items()]
    rng.shuffle(lines)
    return lines, f"{title}\n\n{told.story}" if title else told.story


def _excluded(name: str, chosen: dict[str, str]) -> bool:
    """Whether a kind is among the chosen ones, or cannot stand beside one of them."""
    return name in chosen or any(name in KINDS[other].apart or other in KINDS[name].apart for other in chosen)
