"""One picture of a run with rewards: what was rewarded, what is reported, and what that cost."""

import json
from pathlib import Path

from fledge.evaluation.scoring import MEANING
from fledge.rewards.watch import KEPT, looks_in
from fledge.tasks import FOLLOWING

# Each panel: its title, and what it shows of the looks.
PANELS = (
    ("KL to the start (nats a token)", ("kl",)),
    ("variety", ("distinct_2", "repetition", "copied", "coherence")),
    ("tokens an answer", ("answer_tokens",)),
    ("stopped by end-of-text", ("eos_rate",)),
    ("completion loss on the references (nats)", ("completion_loss",)),
)
OF_NO_TASK = {*MEANING, *(name for _, names in PANELS for name in names), "step", "reward", "coherence_error"}
FROM_LOG = {"frac_reward_zero_std": "dead groups", "entropy": "entropy (nats)"}


def save_picture(log_history: list[dict], folder: Path) -> None:
    """`rewards.png`, from a trainer's log: figures over steps, and a line at the model that is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    looks = looks_in(log_history)
    figure, panels = pyplot.subplots(4, 2, figsize=(11, 12), layout="constrained")
    axes = panels.flatten()
    steps = [entry for entry in log_history if "reward" in entry]
    axes[0].plot([entry["step"] for entry in steps], [entry["reward"] for entry in steps], label="of training prompts")
    axes[0].set_title("reward, weighted and summed")
    of_looks = {"reward": "of validation prompts"}
    _draw(axes[0], looks, of_looks)
    own = [name for name in looks[0] if name not in OF_NO_TASK and "/" not in name]
    axes[1].set_title("reported")
    _draw(axes[1], looks, {name: name.replace("_", " ") for name in sorted(own, key=lambda name: name != FOLLOWING)})
    for axis, (title, names) in zip(axes[2:], PANELS, strict=False):
        axis.set_title(title)
        _draw(axis, looks, {name: name.replace("_", " ") for name in names})
    axes[7].set_title("of the trainer's log")
    for key, label in FROM_LOG.items():
        points = [(entry["step"], float(entry[key])) for entry in log_history if entry.get(key) is not None]
        if points:
            axes[7].plot(*zip(*points, strict=True), label=label)
    for axis in axes:
        for entry in log_history:
            if KEPT in entry:
                axis.axvline(entry[KEPT], color="0.6", linestyle=":")
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize="small")
    figure.savefig(folder / "rewards.png", dpi=110)
    pyplot.close(figure)


def _draw(axis, looks: list[dict], names: dict[str, str]) -> None:
    for name, label in names.items():
        points = [(look["step"], look[name]) for look in looks if name in look]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)


def save_looks(log_history: list[dict], folder: Path) -> None:
    """`watch.jsonl`: a line for each look, with `kept` in the one whose model is kept."""
    kept = next((entry[KEPT] for entry in reversed(log_history) if KEPT in entry), None)
    lines = [json.dumps(look | {"kept": look["step"] == kept}) for look in looks_in(log_history)]
    (folder / "watch.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
