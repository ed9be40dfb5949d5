"""What the report shows of a run's folder: metrics, settings, sampled rollouts. Reads the files of both hosts."""

from __future__ import annotations

import ast
import csv
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aqa.training.run_config import read_config

LONGEST_TEXT = 4_000  # characters of a response or prompt that are shown
TURN_OPEN, TURN_CLOSE = "<|im_start|>assistant\n", "<|im_end|>"
# the sentences of aqa/data/rows.py around the choices; the last ones are the template's
_QUESTION = re.compile(
    r"(?P<question>.*) ?Please choose the answer from the following options: (?P<choices>\[.*\])\. Output the .*",
    re.DOTALL,
)
_USER_TURN = re.compile(r"<\|im_start\|>user\n(?P<turn>.*)<\|im_end\|>\n<\|im_start\|>assistant\n$", re.DOTALL)
_AUDIO_LINE = re.compile(r"Audio \d+: <\|audio_bos\|>(?:<\|AUDIO\|>)+<\|audio_eos\|>\n")
_KNOWN = {"step", "group", "audio_path", "prompt", "response", "reference", "label", "reward", "advantage", "truncated"}


class ReportError(ValueError):
    """There is nothing to report, or it cannot be read; the message names the file."""


@dataclass
class Run:
    """A run's metrics.

    :param folder: Where it is.
    :param name: How the report calls it.
    :param steps: Step numbers, rising.
    :param metrics: Name to one value a step; None where a step has none.
    :param config: From ``run_config.json``, if it is there.
    :param unread: Lines of ``metrics.jsonl`` that are no records.
    """

    folder: Path
    name: str
    steps: list[int]
    metrics: dict[str, list[float | None]]
    config: dict[str, Any] | None
    unread: int


@dataclass
class Group:
    """The responses to one prompt in one step.

    :param step: Rollout step.
    :param number: Among the step's groups.
    :param question: The question's text; the whole prompt if it is not of R1-AQA's form.
    :param choices: The options, or None.
    :param gold: The right answer; empty if it was not recorded.
    :param audio: The clip's file, or None.
    :param responses: text, reward, advantage, right, form, truncated, parts: the other components of the reward.
    """

    step: int
    number: int
    question: str
    choices: list[str] | None
    gold: str
    audio: Path | None
    responses: list[dict[str, Any]] = field(default_factory=list)


# -------------------------------------------------------------------------------------------------------------- metrics
def read_run(folder: Path) -> Run:
    """Read ``metrics.jsonl`` and ``run_config.json``.

    :param folder: The run's folder.
    :raises ReportError: if there is no step to show.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        config = read_config(folder)
    except (OSError, ValueError) as error:
        raise ReportError(f"{folder}: {error}; the folder of a run holds metrics.jsonl") from error
    records: dict[int, dict[str, Any]] = {}
    unread = 0
    for line in lines:
        try:
            record = json.loads(line)
            records[int(record["step"])] = record  # of a step done twice the last counts
        except (ValueError, TypeError, KeyError):
            unread += 1  # the last line of a run that was killed
    if not records:
        raise ReportError(f"{path}: no step in it yet")
    steps = sorted(records)
    names = list(dict.fromkeys(name for step in steps for name in records[step] if name != "step"))
    metrics = {name: [_number(records[step].get(name)) for step in steps] for name in names}
    return Run(folder, folder.resolve().name, steps, metrics, config, unread)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def write_csv(run: Run, path: Path) -> None:
    """The metrics as a table, a row a step; empty where a step has no value.

    :param run: A run.
    :param path: File to write.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *run.metrics])
        writer.writerows(zip(run.steps, *run.metrics.values(), strict=True))


# ------------------------------------------------------------------------------------------------------------- rollouts
def saved_steps(folder: Path, last: int) -> dict[int, Path]:
    """Files of trajectories by step.

    :param folder: The run's folder.
    :param last: Last step of the run; later files are an older run's.
    """
    pattern = re.compile(r"(?:trajectories_)?step_(\d+)\.jsonl?")
    found = {}
    for path in sorted((folder / "trajectories").glob("*.json*")):
        name = pattern.fullmatch(path.name)
        if name and int(name[1]) <= last:
            found[int(name[1])] = path
    return dict(sorted(found.items()))


def read_groups(path: Path, step: int) -> list[Group]:
    """The groups of one step.

    :param path: A file of trajectories: the runtime's JSON Lines, or LightRFT's JSON.
    :param step: Its step.
    :raises ReportError: if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            records = [from_lightrft(record, path.parent) for record in json.loads(text)]
        else:
            records = [record for line in text.split("\n") if (record := _record(line)) is not None]
        keyed = itertools.groupby(records, key=lambda record: (record.get("group"), record["prompt"]))
        return [make_group(step, number, list(members)) for number, (_, members) in enumerate(keyed)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: not readable as trajectories ({type(error).__name__}: {error})") from error


def _record(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # the end of a file that a killed run was writing


def from_lightrft(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A record of LightRFT's trajectory saver in the runtime's form.

    It holds no right answer where the replay buffer has none, and then accuracy and format of the whole micro-batch,
    of which the response's own cannot be told: such values are left out.

    :param record: Its record.
    :param folder: Where it lies, beside the folder of its clips.
    """
    prompt, _, response = record["full_sequence"].rpartition(TURN_OPEN)
    info = record.get("info") or {}
    advantages = [value for value in _flat(record.get("advantages")) if value]
    clips = record.get("image_paths") or []
    parts = {name: list(_flat(value)) for name, value in (info.get("reward_metrics") or {}).items()}
    return {
        "prompt": re.sub(r"^(?:<\|endoftext\|>|<\|PAD_TOKEN\|>|<pad>)+", "", prompt) + TURN_OPEN,
        "response": response.partition(TURN_CLOSE)[0],
        "reference": record.get("reference"),
        "reward": next(iter(_flat(info.get("reward"))), None),
        **{name: own[0] for name, own in parts.items() if len(own) == 1},
        "advantage": advantages[-1] if advantages else 0.0,
        "truncated": False,
        "audio_path": str(folder / clips[0]) if clips else None,
    }


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield value


def make_group(step: int, number: int, records: list[dict[str, Any]]) -> Group:
    """A group of its records.

    :param step: Rollout step.
    :param number: Of the group.
    :param records: At least one, of one prompt.
    """
    question, choices = split_prompt(records[0]["prompt"])
    audio = records[0].get("audio_path")
    group = Group(step, number, question, choices, str(records[0]["reference"] or ""), Path(audio) if audio else None)
    for record in records:
        accuracy, form = record.get("accuracy_reward"), record.get("format_reward")
        parts = {k: v for k, v in record.items() if k not in _KNOWN and isinstance(v, (int, float))}
        group.responses.append(
            {
                "text": shorten(record["response"].removesuffix(TURN_CLOSE)),
                "reward": _number(record.get("reward")),
                "advantage": _number(record.get("advantage")),
                "right": None if accuracy is None else accuracy > 0,
                "form": None if form is None else form > 0,
                "truncated": bool(record.get("truncated")),
                "parts": {
                    k: v for k, v in parts.items() if k not in ("accuracy_reward", "format_reward", "rule_reward")
                },
            }
        )
    return group


def split_prompt(prompt: str) -> tuple[str, list[str] | None]:
    """The question and the options of a rendered prompt.

    :param prompt: With the template's turns.
    :return: Both, if it is of R1-AQA's form; else the user's turn, and None.
    """
    found = _USER_TURN.search(prompt)
    turn = _AUDIO_LINE.sub("", found["turn"]) if found else prompt
    parts = _QUESTION.fullmatch(turn) if len(turn) <= 4 * LONGEST_TEXT else None
    if parts:
        try:
            choices = ast.literal_eval(parts["choices"])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            choices = None
        if isinstance(choices, list):
            return shorten(parts["question"].strip()), [shorten(str(choice)) for choice in choices]
    return shorten(turn), None


def shorten(text: str) -> str:
    """A text that is not too long for a page.

    :param text: Any text.
    """
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"


def spread(count: int) -> list[int]:
    """0 to ``count - 1``, in an order of which every beginning is spread over the whole: both ends, then middles.

    :param count: How many.
    """
    order = list(dict.fromkeys([0, count - 1])) if count else []
    gaps = [(0, count - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order
