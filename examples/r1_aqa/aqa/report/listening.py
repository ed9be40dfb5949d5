"""What the page lets one listen to: held-out questions with their answers, and groups of sampled responses."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from aqa.audio.decode import AudioError
from aqa.report.audio import encode_clip
from aqa.report.held_out import Answer, HeldOut, main_kind
from aqa.report.run_data import Group, ReportError, read_groups, saved_steps, spread

ITEMS_PER_GROUP = 2  # a held-out item has fewer responses than a group
NOT_SAMPLED: dict[str, Any] = {"advantage": None, "truncated": False, "parts": {}}  # of an evaluation's answer
ITEMS_SHARE = 0.5  # of the page's room; the rest is for training groups


class Clips:
    """The clips of the page, each encoded once, and the room that is left in it.

    :param room: Bytes that clips and what belongs to them may take.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.encoded: list[dict[str, Any]] = []
        self.places: dict[Path, int] = {}

    def add(self, entry: dict[str, Any], audio: Path | None, least_room: int = 0) -> bool:
        """Give an entry its clip, or the reason why it has none.

        :param entry: Gets ``clip``: a place among the clips, or None, and ``silent``: why.
        :param least_room: Bytes that must be left.
        :return: False if there is no room for it.
        """
        entry |= {"clip": self.places.get(audio) if audio else None, "silent": None}
        clip = None
        if audio is None:
            entry["silent"] = "its file is not recorded"
        elif audio not in self.places:
            try:
                clip = encode_clip(audio)
            except AudioError as error:
                entry["silent"] = str(error)
        cost = json_size(entry) + (json_size(clip) if clip else 0)
        if self.room - cost < least_room:
            return False
        self.room -= cost
        if clip is not None:
            entry["clip"] = self.places[audio] = len(self.encoded)
            self.encoded.append(clip)
        return True

    def name_all(self) -> None:
        """Name each clip by its path from the folder that holds them all: file names recur among speakers and kinds.

        Of clips on several disks the last folder and the file name are shown.
        """
        paths = [os.path.abspath(path) for path in self.places]
        common = os.path.commonpath(map(os.path.dirname, paths)) if paths else ""
        for path, clip in zip(paths, self.encoded, strict=True):
            root = os.path.dirname(os.path.dirname(path) if common == os.path.dirname(common) else common)
            clip["name"] = os.path.relpath(path, root)


def embed(value: Any) -> str:
    """A value as JSON that cannot end the script element it stands in, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def json_size(value: Any) -> int:
    """Bytes of a value in the page."""
    return len(embed(value))


def sample(folder: Path, last: int, sets: Sequence[HeldOut], most: int, room: int) -> dict[str, Any]:
    """What can be listened to, as much as the page has room for.

    :param folder: Of the run.
    :param last: Its last step.
    :param most: Groups; twice as many held-out items.
    :param room: Bytes.
    :return: ``groups``, the last step first; ``clips``; ``sets``: what the groups belong to, with a sentence about
        how much of it is shown.
    """
    clips = Clips(room)
    groups: list[dict[str, Any]] = []
    names = []
    wanted = ITEMS_SHARE if saved_steps(folder / "trajectories", last) else 1.0
    for number, held in enumerate(sets):
        share = round(clips.room * (1 - wanted / (len(sets) - number)))
        items = sample_items(held, most * ITEMS_PER_GROUP // len(sets), clips, share)
        groups += [item | {"set": number} for item in items]
        note = f"{len(items):,} of {len(held.items):,} questions"
        if len(items) < len(held.items):
            note += ", one of each mistake, then of each question type and outcome in turn"
        names.append({"name": f"held-out: {held.name}", "note": note})
    rollouts, note = sample_rollouts(folder, last, most, clips)
    groups += [group | {"set": len(names)} for group in rollouts]
    names.append({"name": "training: sampled rollouts", "note": note})
    clips.name_all()
    present = {group["set"] for group in groups}
    return {
        "groups": groups,
        "clips": clips.encoded,
        "sets": [n | {"id": i} for i, n in enumerate(names) if i in present],
    }


# ------------------------------------------------------------------------------------------------------ held-out items
def sample_items(held: HeldOut, most: int, clips: Clips, least_room: int) -> list[dict[str, Any]]:
    """Questions with the first, the last and the silent answer, and the last of each other run: one of each mistake,
    the most frequent first, then of each outcome and question type in turn.

    :param least_room: Bytes that are left for others.
    """
    heard = held.heard
    shown = [*held.ends, *held.quiet[-1:], *(each for each in held.rounds if each.other)]
    first, last = heard[0].answers, heard[-1].answers
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    mistakes: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for number, (key, item) in enumerate(held.items.items()):
        if key not in last:
            continue
        entry = {
            "step": None,
            "number": number,
            "kind": item.kind,
            "question": item.question,
            "choices": item.choices,
            "gold": item.gold,
            "outcome": outcome(first.get(key), last[key]),
            "responses": [
                answer._asdict() | NOT_SAMPLED | {"who": each.title, "main": each is heard[-1]}
                for each in shown
                if (answer := each.answers.get(key))
            ],
        }
        entry["audio"] = item.audio
        found[entry["outcome"], item.kind].append(entry)
        if not last[key].right:
            mistakes[item.kind, item.gold, last[key].said].append(entry)
    frequent = [entries[0] for entries in sorted(mistakes.values(), key=len, reverse=True)]
    in_turn = filter(None, chain.from_iterable(zip_longest(*(found[key] for key in sorted(found)))))
    chosen: list[dict[str, Any]] = []
    for entry in {entry["number"]: entry for entry in [*frequent, *in_turn]}.values():
        audio = entry.pop("audio")
        if len(chosen) == most or not clips.add(entry, audio, least_room):
            break
        chosen.append(entry)
    return sorted(chosen, key=lambda entry: entry["number"])


def outcome(first: Answer | None, last: Answer) -> str:
    """Whether an answer is right, and whether it was: became right, became wrong, right or wrong."""
    now = "right" if last.right else "wrong"
    return now if first is None or first.right == last.right else f"became {now}"


# ------------------------------------------------------------------------------------------------------------- rollouts
def sample_rollouts(folder: Path, last: int, most: int, clips: Clips) -> tuple[list[dict[str, Any]], str]:
    """Groups of steps that are spread over the run, the last step first; and how much that is of what there is."""
    files = saved_steps(folder / "trajectories", last)
    steps = list(files)
    unreadable: list[int] = []

    def candidates() -> Iterator[Group]:
        for place in spread(len(steps)):
            try:
                yield from read_groups(files[steps[place]], steps[place])
            except ReportError:
                unreadable.append(steps[place])

    groups: list[dict[str, Any]] = []
    for group in candidates():
        entry = group_entry(group)
        if not clips.add(entry, group.audio):
            break
        groups.append(entry)
        if len(groups) == most:
            break
    groups.sort(key=lambda group: (-group["step"], group["number"]))
    shown = len({group["step"] for group in groups})
    note = f"{len(groups)} groups of {shown} steps; the run saved {len(files)} steps"
    if unreadable:
        note += f", of which {len(unreadable)} cannot be read ({', '.join(map(str, sorted(unreadable)[:5]))})"
    return groups, note if files else ""


def group_entry(group: Group) -> dict[str, Any]:
    """A group as the page holds it, without its clip."""
    tags = [tag.partition("/") for tag in group.tags]
    kind = main_kind(name for name, _, _ in tags)
    return {
        "step": group.step,
        "number": group.number,
        "kind": next((value for name, _, value in tags if name == kind), ""),
        "question": group.question,
        "choices": group.choices,
        "gold": group.gold,
        "outcome": None,
        "responses": [{"who": str(i), "main": True} | response for i, response in enumerate(group.responses, 1)],
    }
