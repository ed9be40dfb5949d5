"""The terminal's view of a step: a bar that names the phase, and lines of at most 80 columns."""

import re
import time
from typing import Any

from tqdm import tqdm

from lightrft.utils.console import console, paint

PHASE_WIDTH = 9
ESTIMATES = (3, 10, 30, 100, 300, 1000, 3000)  # steps of a session after which the time that is left is told
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
        self._left, self._done = total - done, 0  # steps of this session
        self._first_ended = 0.0

    def phase(self, name: str) -> None:
        """Show the phase's name, of at most nine characters."""
        self._bar.set_description_str(f"{name:<{PHASE_WIDTH}}")

    def step(self, *lines: str) -> None:
        """End a step: print its lines above the bar, and sometimes how long the other steps will take.

        :param lines: At most 80 columns each.
        """
        self._bar.update()
        self.show(*lines)
        self._done += 1
        self._first_ended = self._first_ended or time.perf_counter()  # it warms up, and does not count
        left = self._left - self._done
        if self._done in ESTIMATES and left > 0:
            seconds = (time.perf_counter() - self._first_ended) / (self._done - 1)
            self.show(paint(f"{'':5}about {duration(seconds * left)} to go, at {seconds:.1f} s a step", "dim"))

    def show(self, *lines: str) -> None:
        """Print lines above the bar."""
        for line in lines:
            console.print(line)

    def close(self) -> None:
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
            for name in ("data", "rollout", "logprobs", "silence", "train", "sync")
            if f"time/{name}" in m
        )
        lines.append(paint(f"{'':5}seconds: {phases}", "dim"))
    return lines + evaluation_lines(step, total, m)


def evaluation_lines(step: int, total: int, metrics: dict[str, float]) -> list[str]:
    """The line of a step's evaluation, if it had one."""

    def title(name: str) -> str:
        heard = re.sub("_silent(?=/|$)", "", name)  # a file's own name may end so
        in_silence = " in silence" if heard != name and heard in metrics else ""
        return (heard if in_silence else name).split("/")[1].replace("_reward", "") + in_silence

    accuracies = [
        f"{title(name)} {fit(value, 3)}"
        for name, value in metrics.items()
        if name.startswith("eval/") and name.endswith(("/accuracy_reward", "/accuracy_reward_silent", "/accuracy"))
    ]
    best = ["(best)"] if metrics.get("eval/best_step") == step else []
    line = paint(f"eval {step:>{len(str(total))}}/{total}  {'  '.join(accuracies + best)}", "bold")
    return [line] if accuracies else []


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for limit, unit, size in ((100, "s", 1), (5_400, "min", 60), (172_800, "h", 3_600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def fit(value: float, decimals: int, width: int = 5) -> str:
    """A number with as many decimals as the width has room for.

    :param width: Most characters; a number that has more before its point keeps those.
    """
    for digits in range(decimals, -1, -1):
        text = f"{value:.{digits}f}"
        if len(text) <= width:
            break
    return text
