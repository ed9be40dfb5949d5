"""The table that a run ends with on the terminal: its metrics at the first and the last step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECENT = 10  # steps of the last column's mean
ROWS = (
    ("reward", "rollout/reward", ".3f"),
    ("accuracy", "rollout/accuracy_reward", ".3f"),
    ("format", "rollout/format_reward", ".3f"),
    ("response, tokens", "rollout/response_length", ".1f"),
    ("KL to the start", "train/kl", ".4f"),
    ("gradient norm", "train/grad_norm", ".3g"),
    ("log-prob gap, max", "rollout/logprob_gap_max", ".0e"),
    ("step, seconds", "time/step", ".1f"),
)
COUNTS = {
    "health/anomalies": "warnings, see above",
    "health/skipped_steps": "optimizer steps left out",
    "health/failed_saves": "checkpoints that could not be written",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run, in the order of the steps.

    :param path: ``metrics.jsonl``; empty if there is none. A last line that was cut off is left out.
    """
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def summary(save_path: str) -> str:
    """The table, and where model and metrics are; at most 80 columns, except for paths."""
    path = Path(save_path) / "metrics.jsonl"
    return "\n".join(("", *summary_table(read_metrics(path)), f"model     {save_path}", f"metrics   {path}"))


def summary_table(records: list[dict[str, Any]]) -> list[str]:
    """First and last step, mean of the last ones, and counts of what went wrong.

    :param records: One a step; a value is None where the step has no such number.
    """
    if not records:
        return []
    last = f"step {records[-1]['step']}"
    lines = [f"{'':18}{'step ' + str(records[0]['step']):>12}{last:>12}{f'mean of {min(RECENT, len(records))}':>12}"]
    evaluations = sorted({name for record in records for name in record if is_accuracy(name)})
    for label, name, form in (*ROWS, *((name.removesuffix("_reward"), name, ".3f") for name in evaluations)):
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            recent = [r[name] for r in records[-RECENT:] if r.get(name) is not None] or values[-1:]
            cells = (values[0], values[-1], sum(recent) / len(recent))
            lines.append(f"{label:18}" + "".join(f"{format(value, form):>12}" for value in cells))
    lines += [f"{int(records[-1][name])} {what}" for name, what in COUNTS.items() if records[-1].get(name)]
    return lines


def is_accuracy(name: str) -> bool:
    """Whether a metric is the accuracy of an evaluation."""
    return name.startswith("eval/") and name.endswith(("/accuracy_reward", "/accuracy"))
