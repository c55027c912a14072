"""How a run with rewards went: a line for each step, and a picture at the end."""

from pathlib import Path

from typing_extensions import override

from fledge.training.run_record import Progress

MEAN = "/mean"
REWARDS = "rewards/"
# Beside the rewards: what the log calls it, and what the picture does.
OTHERS = {
    "completions/mean_length": "tokens of an answer",
    "completions/clipped_ratio": "share of answers that were cut",
    "kl": "KL to the start (nats per token)",
    "entropy": "entropy (nats per token)",
    "frac_reward_zero_std": "share of groups without a difference",
    "grad_norm": "norm of the gradient",
}


def rewards_in(entry: dict) -> dict[str, float]:
    """The mean of each reward in a logged step, by name; one that no prompt called for is left out."""
    found = {key.removeprefix(REWARDS).removesuffix(MEAN): value for key, value in entry.items() if key.endswith(MEAN)}
    return {name: value for name, value in found.items() if f"{REWARDS}{name}{MEAN}" in entry and value is not None}


class RewardProgress(Progress):
    """One line a logged step: the reward, each reward by name, the answers' length, KL, tokens a second, time left."""

    @override
    def figures(self, logs: dict[str, float]) -> str:
        if "reward" not in logs:
            return super().figures(logs)
        said = [f"reward {logs['reward']:.3f}", *(f"{name} {value:.2f}" for name, value in rewards_in(logs).items())]
        said.append(f"{logs['completions/mean_length']:.0f} tokens an answer")
        if "kl" in logs:
            said.append(f"KL {logs['kl']:.3f}")
        return "  ".join(said)


def save_curves(log_history: list[dict], folder: Path) -> None:
    """The rewards by name and what they cost, over steps, as `reward_curves.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [entry for entry in log_history if "reward" in entry]
    shown = {key: label for key, label in OTHERS.items() if any(key in entry for entry in steps)}
    figure, panels = pyplot.subplots((len(shown) + 3) // 2, 2, figsize=(10, 9), layout="constrained", squeeze=False)
    axes = panels.flatten()
    axes[0].plot([entry["step"] for entry in steps], [entry["reward"] for entry in steps])
    axes[0].set(title="reward, weighted and summed")
    for name in dict.fromkeys(name for entry in steps for name in rewards_in(entry)):
        points = [(entry["step"], rewards_in(entry)[name]) for entry in steps if name in rewards_in(entry)]
        axes[1].plot(*zip(*points, strict=True), label=name)
    axes[1].set(title="rewards by name")
    axes[1].legend(frameon=False)
    for panel, (key, label) in zip(axes[2:], shown.items(), strict=False):
        points = [(entry["step"], float(entry[key])) for entry in steps if key in entry]
        panel.plot(*zip(*points, strict=True))
        panel.set(title=label)
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.set_xlabel("step")
    figure.savefig(folder / "reward_curves.png", dpi=110)
    pyplot.close(figure)
