"""The terminal's view of a step: a bar that names the phase, and lines of at most 80 columns."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from lightrft.utils.console import console, paint

PHASE_WIDTH = 9
BAR = "{desc} {bar}| {n_fmt}/{total_fmt}  {elapsed} < {remaining}"


class Progress:
    """A bar at the bottom of the terminal; nothing where there is no terminal, or ``--quiet``.

    :param shown: Whether this process has the terminal.
    """

    def __init__(self, total: int = 0, done: int = 0, shown: bool = False) -> None:
        shown = shown and not console.quiet and console.stream.isatty()
        self._bar: Any = tqdm(
            total=total, initial=done, file=console.stream, disable=not shown, leave=False, bar_format=BAR
        )
        console.bar = self._bar if shown else None

    def phase(self, name: str) -> None:
        """Show the phase's name, of at most nine characters."""
        self._bar.set_description_str(f"{name:<{PHASE_WIDTH}}")

    def step(self, *lines: str) -> None:
        """End a step: print its lines above the bar.

        :param lines: At most 80 columns each.
        """
        self._bar.update()
        for line in lines:
            console.print(line)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
        console.bar = None


def step_lines(step: int, total: int, metrics: dict[str, float]) -> list[str]:
    """The lines of a step: its own; with ``--verbose`` one of its phases; one of its evaluation if there was one."""
    m = metrics
    lines = [
        f"step {step:>{len(str(total))}}/{total}  reward {fit(m['rollout/reward'], 2, 4)}  "
        f"acc {fit(m['rollout/accuracy_reward'], 2, 4)}  len {fit(m['rollout/response_length'], 1, 4)}  "
        f"kl {fit(m['train/kl'], 4)}  avg gap {m['rollout/logprob_gap_mean']:.0e}  {fit(m['time/step'], 1, 4)} s"
    ]
    if console.verbose:
        phases = "  ".join(
            f"{name} {fit(m[f'time/{name}'], 2)}"
            for name in ("data", "rollout", "logprobs", "train", "sync")
            if f"time/{name}" in m
        )
        lines.append(paint(f"{'':5}seconds: {phases}", "dim"))
    accuracies = [
        f"{name.removeprefix('eval/').removesuffix('_reward')} {fit(value, 3)}"
        for name, value in m.items()
        if name.startswith("eval/") and name.endswith(("/accuracy_reward", "/accuracy_reward_silent", "/accuracy"))
    ]
    if accuracies:
        best = ["(best)"] if m.get("eval/best_step") == step else []
        lines.append(paint(f"eval {step:>{len(str(total))}}/{total}  {'  '.join(accuracies + best)}", "bold"))
    return lines


def fit(value: float, decimals: int, width: int = 5) -> str:
    """A number with as many decimals as the width has room for.

    :param width: Most characters; a number that has more before its point keeps those.
    """
    for digits in range(decimals, -1, -1):
        text = f"{value:.{digits}f}"
        if len(text) <= width:
            break
    return text
