"""The course of a run with rewards: a line for each step, and a picture at the end."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from fledge.evaluation.scoring import MEANING
from fledge.pictures import picture
from fledge.rewards.watch import kept_step, looks_in
from fledge.training.run_record import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN = "/mean"
REWARDS = "rewards/"
# What the picture shows of the looks, and under which title.
OF_LOOKS = {
    "KL to the start (nats a token)": ("kl",),
    "variety": ("distinct_2", "repetition", "copied", "same_ending", "coherence"),
    "completion loss on the references (nats)": ("completion_loss",),
    "tokens an answer": ("answer_tokens",),
    "share of answers that stop": ("eos_rate",),
}
OF_NO_TASK = {*MEANING, *(name for names in OF_LOOKS.values() for name in names), "step", "reward", "coherence_error"}
OF_LOG = {"frac_reward_zero_std": "groups without a difference", "entropy": "entropy (nats a token)"}


def rewards_in(entry: dict) -> dict[str, float]:
    """The mean of each reward in a logged step, by name; one that no prompt called for is left out."""
    found = {key.removeprefix(REWARDS).removesuffix(MEAN): value for key, value in entry.items() if key.endswith(MEAN)}
    return {name: value for name, value in found.items() if f"{REWARDS}{name}{MEAN}" in entry and value is not None}


class RewardProgress(Progress):
    """One line a logged step: the reward, each reward by name, the answers' length, KL, tokens a second, time left."""

    @override
    def figures(self, logs: dict[str, float]) -> str:
        if "reward" not in logs:
            return f"the same answers again  {super().figures(logs)}"
        said = [f"reward {logs['reward']:.3f}", *(f"{name} {value:.2f}" for name, value in rewards_in(logs).items())]
        said.append(f"{logs['completions/mean_length']:.0f} tokens an answer")
        if "kl" in logs:
            said.append(f"KL {logs['kl']:.3f}")
        return "  ".join(said)


def save_picture(log_history: list[dict], folder: Path) -> None:
    """Draws `rewards.png`: the rewards, the reported metrics, and the limits; a dotted line marks the kept model."""
    looks, steps = looks_in(log_history), [entry for entry in log_history if "reward" in entry]
    own = sorted({name for look in looks for name in look if name not in OF_NO_TASK and not name.startswith(REWARDS)})
    with picture(folder / "rewards.png", (15, 11), 3, 3, dpi=110) as panels:
        axes = panels.flatten()
        axes[0].set_title("reward, weighted and summed")
        _draw(axes[0], steps, {"reward": "of training prompts"}, "")
        _draw(axes[0], looks, {"reward": "of validation prompts"})
        axes[1].set_title("rewards of training prompts")
        _draw(axes[1], steps, {f"{REWARDS}{name}{MEAN}": name for entry in steps for name in rewards_in(entry)}, "")
        axes[2].set_title("reported of validation prompts")
        _draw(axes[2], looks, {name: name.replace("_", " ") for name in own})
        for axis, (title, names) in zip(axes[3:], OF_LOOKS.items(), strict=False):
            axis.set_title(title)
            _draw(axis, looks, {name: name.replace("_", " ") for name in names})
        axes[8].set_title("of the trainer's log")
        _draw(axes[8], steps, OF_LOG, "")
        kept = kept_step(log_history)
        for axis in axes:
            if kept is not None:
                axis.axvline(kept, color="0.6", linestyle=":", label="kept" if axis is axes[0] else None)
            axis.grid(alpha=0.3)
            axis.set_xlabel("step")
            if axis.get_legend_handles_labels()[1]:
                axis.legend(frameon=False, fontsize="small")


def _draw(axis: "Axes", entries: list[dict], names: dict[str, str], marker: str = "o") -> None:
    for name, label in names.items():
        points = [(entry["step"], float(entry[name])) for entry in entries if entry.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=label)


def save_looks(log_history: list[dict], folder: Path) -> None:
    """Writes `watch.jsonl`: a line for each look, with `kept` in the one whose model is kept."""
    kept = kept_step(log_history)
    lines = [json.dumps(look | {"kept": look["step"] == kept}) + "\n" for look in looks_in(log_history)]
    (folder / "watch.jsonl").write_text("".join(lines), encoding="utf-8")
