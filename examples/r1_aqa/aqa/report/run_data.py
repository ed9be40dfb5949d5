"""What the report shows of a run's folder: metrics, settings, sampled rollouts. Reads the files of both hosts."""

from __future__ import annotations

import ast
import csv
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aqa.common.constants import ASSISTANT_HEADER
from aqa.data.prompts import OPTIONS_SENTENCE
from aqa.evaluation.answers import extract_answer
from aqa.training.run_config import read_config

LONGEST_TEXT = 4_000  # characters of a response or prompt that are shown
LONGEST_ANSWER = 60  # characters shown of an answer that is none of the choices
NO_ANSWER = "no answer in the form"  # no answer tags, and the response names no choice
TURN_CLOSE = "<|im_end|>"
_BEFORE_OPTIONS, _AFTER_OPTIONS = map(re.escape, OPTIONS_SENTENCE.split("{choices}"))
_QUESTION = re.compile(rf"(?P<question>.*) ?{_BEFORE_OPTIONS}(?P<choices>\[.*\]){_AFTER_OPTIONS} .*", re.DOTALL)
_USER_TURN = re.compile(
    r"<\|im_start\|>user\n(?P<turn>.*)<\|im_end\|>\n" + re.escape(ASSISTANT_HEADER) + "$", re.DOTALL
)
_AUDIO_LINE = re.compile(r"Audio \d+: <\|audio_bos\|>(?:<\|AUDIO\|>)+<\|audio_eos\|>\n")
# fields of a record that are no further components of the reward
_KNOWN = {
    "step",
    "group",
    "audio_path",
    "tags",
    "prompt",
    "response",
    "reference",
    "label",
    "reward",
    "advantage",
    "truncated",
}
_KNOWN |= {"accuracy_reward", "format_reward", "rule_reward"}


class ReportError(ValueError):
    """There is nothing to report, or it cannot be read; the message names the file."""


@dataclass
class Run:
    """A run's metrics and settings."""

    folder: Path
    name: str  # as the report shows it
    steps: list[int]  # rising
    metrics: dict[str, list[float | None]]  # one value a step; None where a step has none
    config: dict[str, Any] | None  # of run_config.json, if it is there
    unread: int  # lines of metrics.jsonl that are no records

    def values(self, name: str) -> list[float]:
        """A metric's values, without the steps that have none."""
        return [value for value in self.metrics.get(name, []) if value is not None]


@dataclass
class Group:
    """The responses to one prompt in one step."""

    step: int
    number: int  # among the step's groups
    tags: list[str]  # such as question_type/music; none in runs of an older version
    question: str  # the whole prompt if it is not of R1-AQA's form
    choices: list[str] | None
    gold: str  # the right answer; empty if it was not recorded
    audio: Path | None
    # text, said, reward, advantage, right, form, truncated, and parts: the other components of the reward
    responses: list[dict[str, Any]] = field(default_factory=list)


# -------------------------------------------------------------------------------------------------------------- metrics
def read_run(folder: Path) -> Run:
    """Read ``metrics.jsonl`` and ``run_config.json`` of a run's folder.

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
    """Write the metrics as a table, a row a step; a cell is empty where a step has no value."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *run.metrics])
        writer.writerows(zip(run.steps, *run.metrics.values(), strict=True))


# ------------------------------------------------------------------------------------------------------------- rollouts
def saved_steps(folder: Path, last: int) -> dict[int, Path]:
    """Files of responses by step.

    :param folder: ``trajectories`` or ``eval/rows`` of a run.
    :param last: Last step of the run; files of later steps are left over from an older run.
    """
    pattern = re.compile(r"(?:trajectories_)?step_(\d+)\.jsonl?")
    found = {}
    for path in sorted(folder.glob("*.json*")):
        name = pattern.fullmatch(path.name)
        if name and int(name[1]) <= last:
            found[int(name[1])] = path
    return dict(sorted(found.items()))


def read_groups(path: Path, step: int) -> list[Group]:
    """The groups of one step.

    :param path: The step's file of trajectories: the runtime's JSON Lines, or LightRFT's JSON.
    :raises ReportError: if it cannot be read.
    """
    try:
        records = read_records(path)
        keyed = itertools.groupby(records, key=lambda record: (record.get("group"), record["prompt"]))
        return [make_group(step, number, list(members)) for number, (_, members) in enumerate(keyed)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: not readable as trajectories ({type(error).__name__}: {error})") from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """The responses in a file of the runtime (JSON Lines) or of LightRFT (JSON).

    :raises ReportError: if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return [from_lightrft(record, path.parent) for record in json.loads(text)]
        return [record for line in text.split("\n") if (record := _record(line)) is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: not readable as trajectories ({type(error).__name__}: {error})") from error


def _record(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # a run was killed while it wrote this line


def from_lightrft(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A record of LightRFT's trajectory saver in the runtime's form.

    LightRFT may record accuracy and format of a whole micro-batch. Which value belongs to the response is then unknown,
    so such values are left out. The right answer is missing where its replay buffer does not hold it.

    :param folder: The record's folder, to which its clips' paths are relative.
    """
    prompt, _, response = record["full_sequence"].rpartition(ASSISTANT_HEADER)
    info = record.get("info") or {}
    advantages = [value for value in _flat(record.get("advantages")) if value]
    clips = record.get("image_paths") or []
    parts = {name: list(_flat(value)) for name, value in (info.get("reward_metrics") or {}).items()}
    return {
        "prompt": re.sub(r"^(?:<\|endoftext\|>|<\|PAD_TOKEN\|>|<pad>)+", "", prompt) + ASSISTANT_HEADER,
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
    """A group, made of the records of its responses; there is at least one."""
    question, choices = split_prompt(records[0]["prompt"])
    audio = records[0].get("audio_path")
    gold = str(records[0]["reference"] or "")
    tags = list(records[0].get("tags") or ())
    group = Group(step, number, tags, question, choices, gold, Path(audio) if audio else None)
    for record in records:
        accuracy, form = record.get("accuracy_reward"), record.get("format_reward")
        text = record["response"].removesuffix(TURN_CLOSE)
        group.responses.append(
            {
                "text": shorten(text),
                "said": what_was_said(text, choices or []),
                "reward": _number(record.get("reward")),
                "advantage": _number(record.get("advantage")),
                "right": None if accuracy is None else accuracy > 0,
                "form": None if form is None else form > 0,
                "truncated": bool(record.get("truncated")),
                "parts": {k: v for k, v in record.items() if k not in _KNOWN and isinstance(v, (int, float))},
            }
        )
    return group


def split_prompt(prompt: str) -> tuple[str, list[str] | None]:
    """The question and the options of a rendered prompt; if it is not of R1-AQA's form, the user's turn and None."""
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


def what_was_said(response: str, choices: Sequence[str]) -> str:
    """The choice that a response names, else the beginning of its answer, or :data:`NO_ANSWER`."""
    answer = extract_answer(response, choices)
    if answer.is_choice:
        return answer.text
    return answer.text[:LONGEST_ANSWER] if answer.tagged else NO_ANSWER


def shorten(text: str) -> str:
    """A text, cut where it would be too long for the page."""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"


def spread(count: int) -> list[int]:
    """0 to ``count - 1``: the last, the first, then middles, so that any first k are spread over the whole."""
    order = list(dict.fromkeys([count - 1, 0])) if count else []
    gaps = [(0, count - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order
