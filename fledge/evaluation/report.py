"""The reports of an evaluation: a table for the terminal, `report.md`, and the page `report.html`."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from fledge.errors import UserError
from fledge.evaluation.figures import HEADLINE
from fledge.evaluation.intervals import NO_SHARES, preference
from fledge.pages import MODEL_CARD, open_templates

LOWER_IS_BETTER = ("completion_loss", "perplexity", "bits_per_byte", "repetition", "copied", "same_ending")
WHO = {"base": "base", "model": "instruct"}
NEUTRAL = ("answer_tokens", "distinct_2")
ONE_DIGIT = ("answer_tokens", "judge_score")


def show(name: str, metric: dict[str, float] | None) -> str:
    """`87.3% (83.1 to 91.2)` for a share, three digits for anything else, an empty text for `None`."""
    if metric is None:
        return ""
    scale, digits, unit = (100, 1, "%") if name not in NO_SHARES else (1, 1 if name in ONE_DIGIT else 3, "")
    size = abs(metric["value"])  # a perplexity, of a model that has never seen such text, may be any number
    form = ".1e" if size >= 1e6 else ",.0f" if size >= 1000 else f".{digits}f"
    value, low, high = (f"{scale * metric[end]:{form}}" for end in ("value", "low", "high"))
    # All prompts gave the same value, which may lie anywhere: nothing tells how sure it is.
    return f"{value}{unit} (no interval)" if metric["low"] == metric["high"] else f"{value}{unit} ({low} to {high})"


def title(name: str) -> str:
    return name.replace("_", " ")


def share(metric: dict[str, float] | None) -> str:
    """`48.9%`, or an empty text for `None`."""
    return "" if metric is None else f"{metric['value']:.1%}"


def beside(metrics: dict, who: str = "model", name: str = HEADLINE) -> str:
    """A figure with its chance level and reference: `67% (chance 49%, reference 99%)`."""
    chance = metrics["chance"][who].get(name)
    held = f"chance {chance['value']:.0%}" if chance else f"no chance level: {metrics['no_chance'][name]}"
    return f"{metrics[who][name]['value']:.0%} ({held}, reference {metrics['reference'][name]['value']:.0%})"


def table(metrics: dict) -> str:
    """Base beside instruct as a Markdown table that also reads well in a terminal; chance is that of instruct."""
    rows: list[tuple[str, ...]] = [("metric", "base", "instruct", "difference", "chance", "reference")]
    for name in metrics["model"]:
        parts = (show(name, metrics[part].get(name)) for part in ("base", "model", "difference"))
        ends = (
            show(name, found.get(name)).split(" (")[0] for found in (metrics["chance"]["model"], metrics["reference"])
        )
        rows.append((title(name), *parts, *ends))
    return aligned(rows)


def table_by(metrics: dict, name: str = HEADLINE) -> str:
    """One metric for all prompts and for each class, beside chance, the references and answers without a model."""
    rows = [("only", "prompts", "base", "instruct", "chance", "reference", *map(title, metrics["baselines"]))]
    for label, of_label in classes(metrics):
        shown = [show(name, of_label[who].get(name)) for who in ("base", "model")]
        held = [of_label["chance"], of_label["reference"], *of_label["baselines"].values()]
        rows.append((label, str(of_label["prompts"]), *shown, *(share(found.get(name)) for found in held)))
    return aligned(rows)


def classes(metrics: dict) -> list[tuple[str, dict]]:
    """All prompts, then the classes of each column: what to call them, and their figures as `by` holds them."""
    whole = {key: metrics[key] for key in ("base", "model", "reference", "baselines")}
    found = [("all", {"prompts": metrics["num_prompts"], "chance": metrics["chance"]["model"], **whole})]
    for column, labels in metrics["by"].items():
        found += [(f"{column} = {label}", of_label) for label, of_label in labels.items()]
    return found


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows, of which the first names the columns, as a Markdown table that also reads well in a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def judged_by(metrics: dict) -> list[str]:
    """A sentence about each judge and its reliability."""
    sentences, llm = list(metrics["judge"].get("says", [])), metrics.get("llm_judge")
    if llm:
        of_scores = llm["scores"]
        sentences.append(
            f"{llm['model']} scored answers from 0 to 100, {llm['samples']} replies each: "
            f"{of_scores['answers_without_score']} of {of_scores['answers']} answers have no score "
            f"({of_scores['unparseable']} of {of_scores['asked']} replies held none, "
            f"{of_scores['unanswered']} requests failed{_last(llm)}). An answer without one is left out of the mean."
        )
        if pairs := llm.get("pairs"):
            sentences.append(
                f"It compared {pairs['pairs']} pairs in both orders: {pairs['pairs_decided_by_order']} were decided by "
                f"the order and count as undecided, {pairs['pairs_without_verdict']} have no verdict: {preferred(llm)}."
            )
    if human := metrics.get("human"):
        sentences.append(
            f"People who did not know which was which rated {human['model'] + human['base'] + human['tie']} pairs of "
            f"answers ({human['raters']} file(s)) and preferred instruct {human['model']} times, base {human['base']}, "
            f"neither {human['tie']}: {preferred(human)}."
        )
    return sentences


def held_against(metrics: dict) -> list[str]:
    """A sentence each about chance and reference."""
    without = {name: level["without"] for name, level in metrics["chance"]["model"].items()}
    if set(without.values()) <= {"instruction"}:
        chance = "Chance: the same answers of instruct, scored against the instructions of other prompts."
    else:
        levels = ", ".join(f"{title(name)} without the {part}" for name, part in without.items())
        chance = (
            "Chance: the same answers of instruct, scored with one part of each instruction taken from another prompt, "
            f"the part without which most is reached ({levels})."
        )
    return [chance, "Reference: the held-out answers, scored as if a model had written them."]


def cautions(metrics: dict) -> list[str]:
    """A sentence about each figure that is no better than chance or than answers without a model."""
    sentences = []
    for who, called in WHO.items():
        at_chance = [
            title(name) for name, chance in metrics["chance"][who].items() if _reaches(metrics[who][name], chance)
        ]
        if at_chance:
            sentences.append(
                f"No better than chance: {called}'s {', '.join(at_chance)} "
                f"({'their intervals reach' if len(at_chance) > 1 else 'its interval reaches'} what the same answers "
                "score when a part of their instruction is another prompt's)."
            )
    for who, apart in metrics["judges_apart"].items():
        first, second = apart["metrics"]
        sentences.append(
            f"The judges part by {100 * abs(apart['difference']):.1f} points on {WHO[who]}'s answers "
            f"({title(first)} {share(metrics[who][first])}, {title(second)} {share(metrics[who][second])}): "
            "one of them is being gamed, or is wrong about these answers; read some."
        )
    if HEADLINE in metrics["no_chance"]:
        sentences.append(f"Instruction following has no chance level here: {metrics['no_chance'][HEADLINE]}.")
    for baseline in metrics["baselines"]:
        levels = [
            f"{label} {share(of_label['baselines'][baseline][HEADLINE])}"
            for label, of_label in classes(metrics)
            if _reaches(of_label["model"][HEADLINE], of_label["baselines"][baseline][HEADLINE])
        ]
        if levels:
            sentences.append(
                f"Instruct follows no better than the baseline {title(baseline)}, which needs no model: "
                f"{', '.join(levels)}."
            )
    return sentences


def _reaches(metric: dict[str, float], level: dict[str, float]) -> bool:
    return metric["low"] <= level["value"]


def headroom(metrics: dict) -> list[str]:
    """A sentence per model about what choosing among several answers can gain; none for one answer per prompt."""
    sentences = []
    for who, found in metrics.get("headroom", {}).items():
        tries = [
            f"{share(metric)} within {name.removeprefix('pass@')}" for name, metric in found.items() if "@" in name
        ]
        undecided = 1 - found["all_right"]["value"] - found["all_wrong"]["value"]
        sentences.append(
            f"Headroom of {WHO[who]}: an answer that follows comes in {', '.join(tries)} of {metrics['num_samples']} "
            f"answers (pass@k). Of the prompts {share(found['all_right'])} have only right answers and "
            f"{share(found['all_wrong'])} only wrong ones; choosing or rewards can gain at once on the other "
            f"{abs(undecided):.1%}."
        )
    return sentences


def preferred(judged: dict) -> str:
    shown = show("preference", judged["preference"])
    return f"instruct preferred {shown}, undecided counting half" if shown else "no preference"


def _last(llm: dict) -> str:
    return f"; the last: {llm['last_failure']}" if llm["last_failure"] else ""


def report(metrics: dict) -> str:
    """`report.md`: the table, cautions, the judges, and the definition of each metric."""
    parts = [
        "# Base against instruct",
        f"{asked(metrics)}; 95% intervals over prompts. Instruction following: base {beside(metrics, 'base')}, "
        f"instruct {beside(metrics)}.",
        table(metrics),
        *held_against(metrics),
        *cautions(metrics),
        *headroom(metrics),
        *judged_by(metrics),
        "Instruction following, also class by class and by answers that need no model:",
        table_by(metrics),
        "\n".join(f"- {title(name)}: {metrics['meaning'][name]}" for name in metrics["model"]),
    ]
    return "\n\n".join(parts) + "\n"


def asked(metrics: dict) -> str:
    samples = metrics["num_samples"]
    each = f", {samples} answers each," if samples > 1 else ""
    such = f" with {' and '.join(metrics['only'])}" if metrics["only"] else ""
    return f"{metrics['num_prompts']:,} held-out prompts{such}{each} of the {metrics['split']} split"


def answers_id(samples: list[dict]) -> str:
    """A fingerprint of these answers, so that ratings of other answers are refused."""
    texts = json.dumps([[sample[who]["text"] for who in WHO] for sample in samples], ensure_ascii=True)
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


POINTS = {"model": 1.0, "base": 0.0, "tie": 0.5}


def read_ratings(file: str) -> dict:
    """Opens a file of ratings that the page saved.

    Raises:
        UserError: the file is missing or is something else.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        ratings = [(int(rating["prompt"]), POINTS[rating["preferred"]]) for rating in content["ratings"]]
        return {"file": file, "answers": str(content["answers"]), "ratings": ratings}
    except OSError as error:
        raise UserError(f"--ratings {file} cannot be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"--ratings {file} is not what the report's blind mode saves; save it again.") from error


def fold_ratings(contents: list[dict], samples: list[dict]) -> dict:
    """How often each preference was given, and the preference over prompts.

    Raises:
        UserError: a file rates other answers than these.
    """
    rated: dict[int, list[float]] = {sample["prompt"]: [] for sample in samples}
    for content in contents:
        if content["answers"] != answers_id(samples) or any(prompt not in rated for prompt, _ in content["ratings"]):
            raise UserError(
                f"--ratings {content['file']} rates other answers than these; --resume keeps those that it was made on."
            )
        for prompt, points in content["ratings"]:
            rated[prompt].append(points)
    given = [points for of_prompt in rated.values() for points in of_prompt]
    counts = {name: given.count(points) for name, points in POINTS.items()}
    return {"raters": len(contents), **counts, "preference": preference(list(rated.values()))}


def page(metrics: dict, samples: list[dict], columns: list[str], names: dict[str, str]) -> str:
    """`report.html`: a single self-contained file with plots, every answer, and blind rating.

    Answers are untrusted. Jinja escapes all text in the page. The script's data is JSON in which no `<` can end the
    script, the script writes text nodes only, and the page's content security policy blocks other scripts and requests.
    """
    script = (MODEL_CARD / "report.js").read_text(encoding="utf-8")
    least = {HEADLINE: 1.0, **metrics["constraints"]}
    data = {"answers": answers_id(samples), "columns": columns, "least": least, "lower_is_better": LOWER_IS_BETTER}
    data["samples"] = samples
    template = open_templates(autoescape=True).get_template("report.html.jinja")
    return template.render(
        metrics=metrics,
        names={who: "/".join(Path(folder).parts[-2:]) for who, folder in names.items()},
        asked=asked(metrics),
        beside={who: share(found[HEADLINE]) for who, found in metrics["chance"].items() if HEADLINE in found},
        held_against=held_against(metrics),
        cautions=cautions(metrics),
        headroom=headroom(metrics),
        classes=classes(metrics),
        constraints=constraint_rows(metrics["constraints"], samples),
        show=show,
        share=share,
        title=title,
        shares=[name for name in metrics["model"] if name not in NO_SHARES],
        lower_is_better=LOWER_IS_BETTER,
        neutral=NEUTRAL,
        judged_by=judged_by(metrics),
        judge=json.dumps(metrics["judge"], indent=2, ensure_ascii=False),
        lengths=histogram({who: [sample[who]["tokens"] for sample in samples] for who in WHO}),
        positions=curves(metrics["loss_by_position"]),
        data=json.dumps(data).replace("<", "\\u003c"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def constraint_rows(least: dict[str, float], samples: list[dict]) -> list[dict]:
    """For each constraint: how many answers of each model meet it, and how many the model gained and lost.

    `least` is the value of each constraint that counts as met. Constraints that the model meets least often come first.
    """
    rows = []
    for name, limit in least.items():
        both = [[sample[who]["scores"].get(name) for who in WHO] for sample in samples]
        met = [(base >= limit, model >= limit) for base, model in both if base is not None and model is not None]
        if met:
            of_base, of_model = (sum(column) for column in zip(*met, strict=True))
            changed = {"gained": met.count((False, True)), "lost": met.count((True, False))}
            rows.append({"name": name, "least": limit, "n": len(met), "base": of_base, "model": of_model} | changed)
    return sorted(rows, key=lambda row: row["model"] / row["n"])


def histogram(lengths: dict[str, list[int]], bins: int = 24) -> dict:
    """Lengths in tokens → for each model the count in each of `bins` equal bins, and a round bin width."""
    longest = max(max(values) for values in lengths.values())
    width = int(_round_up(max(longest / bins, 1)))
    count = longest // width + 1
    counts = {who: [0] * count for who in lengths}
    for who, values in lengths.items():
        for value in values:
            counts[who][value // width] += 1
    return {"width": width, "count": count, "counts": counts, "highest": max(max(c) for c in counts.values())}


def curves(by_position: dict[str, list[dict]]) -> dict:
    """Loss by position in the answer → for each model its points with x and y between 0 and 1, and the axes' ticks."""
    top = max(0.1, *(point["nats"] for points in by_position.values() for point in points))
    step = _round_up(top / 4)
    top = step * math.ceil(top / step)
    ticks = [round(step * i, 6) for i in range(round(top / step) + 1)]
    places = next(iter(by_position.values()))
    last = max(len(places) - 1, 1)
    lines = {
        who: [{"x": i / last, "y": point["nats"] / top, **point} for i, point in enumerate(points)]
        for who, points in by_position.items()
    }
    return {"lines": lines, "ticks": [{"y": tick / top, "label": f"{tick:g}"} for tick in ticks]}


def _round_up(number: float) -> float | int:
    """The next of 1, 2, 5, 10, 20, 50 … (or 0.1, 0.2, 0.5 …)."""
    power = 10 ** math.floor(math.log10(number))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= number * (1 - 1e-9))
    return int(step) if step >= 1 else step
