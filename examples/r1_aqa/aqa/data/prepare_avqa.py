"""The work of ``data_preprocess/avqa.py``: read rows, find and probe their audio, split, write parquet and a report.

pyarrow and soundfile are imported when they are needed: ``--help`` and ``--no_check_audio`` do without.
"""

import argparse
import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from aqa.audio.probe import Clip, first_copies, probe_clip, probe_clips
from aqa.audio.sandbox import escape_of
from aqa.common.console import say, say_problems, several
from aqa.common.constants import PLAIN_LABEL, THINK_LABEL
from aqa.common.files import write_files
from aqa.common.versions import not_installed
from aqa.data.parquet import build_table
from aqa.data.prompts import prompt_lengths, render_chat
from aqa.data.rows import (
    ROW,
    AvqaError,
    Problem,
    Row,
    as_question,
    counts_from_one,
    join_groups,
    parse_records,
    read_field,
    show_value,
    split_by_clip,
)
from aqa.data.tables import records_of
from aqa.families import family_named

TRAIN_FILE, VALIDATION_FILE, REPORT_FILE = "train.parquet", "validation.parquet", "report.json"
QUESTIONS_FILE = "validation.json"
BAD_AUDIO = ("missing", "unreadable", "silent")


@dataclass
class Source:
    """The rows of one file.

    :param rows: Those that are usable.
    :param paths: The audio file of each.
    :param bad: Problems of rows left out because they cannot be used.
    :param read: How many rows the file has, blank lines not counted.
    :param unheard: Problems of rows whose audio is missing or unreadable.
    """

    file: str
    rows: list[Row]
    paths: list[str]
    bad: list[Problem]
    read: int
    unheard: list[Problem] = field(default_factory=list)

    def leave_out(self, problems: list[Problem], none_left: str) -> None:
        """Drop the rows that have a problem.

        :raises AvqaError: with the message ``none_left`` if no row is left.
        """
        bad = {problem.index for problem in problems}
        kept = [(row, path) for row, path in zip(self.rows, self.paths, strict=True) if row.index not in bad]
        if not kept:
            raise AvqaError(f"{self.file}: {none_left}")
        self.rows, self.paths = map(list, zip(*kept, strict=True))


def prepare(args: argparse.Namespace) -> None:
    """Read, check, split, write, report.

    :param args: The flags of ``avqa.py``, checked.
    :raises AvqaError: if nothing is to be written; the save folder is then as before.
    :raises OSError: if a file cannot be read or written.
    """
    # better missed now than after half an hour of probing
    if problems := not_installed("pyarrow", *([] if args.no_check_audio else ["soundfile", "numpy", "tqdm", "soxr"])):
        raise AvqaError(*problems)
    sources = [read_rows(args, file) for file in (args.input_jsonl, args.val_file) if file]
    clips = probe(args, [path for source in sources for path in source.paths])
    if clips and all(clip.kind == "audio_missing" for clip in clips.values()):
        first = audio_problems(sources[0].rows[:1], sources[0].paths[:1], clips)[0].reason
        lack = f"holds none of the recordings: {first}" if Path(args.audio_dir).is_dir() else "no such folder"
        remedy = "Correct it; for rows whose sound is elsewhere add --no_check_audio"
        raise AvqaError(f"--audio_dir {args.audio_dir}: {lack}. {remedy}")
    for source in sources:
        source.unheard = audio_problems(source.rows, source.paths, clips)
        if source.unheard:
            fate = "KEPT, and training will stop at them unless that is mended by then"
            fate = "left out" if args.skip_bad else "refused" if args.strict else fate
            say_rows(f"{source.file}: rows whose audio cannot be used are {fate}", source.unheard)
            hint = "" if args.skip_bad else "; --skip_bad leaves such rows out"
            say(f"  Looked in --audio_dir {args.audio_dir}{hint}.")
    bad, unheard = (sum(len(getattr(source, name)) for source in sources) for name in ("bad", "unheard"))
    if args.strict and (bad or unheard):
        raise AvqaError(f"--strict: {bad} unusable rows, {unheard} rows without audio. Repair them, or drop --strict")
    if args.skip_bad:
        for source in sources:
            none_left = f"--skip_bad: none of the {len(source.rows)} rows has readable audio; check --audio_dir"
            source.leave_out(source.unheard, none_left)
    write(args, sources, *split(args, sources), clips)


def read_rows(args: argparse.Namespace, name: str) -> Source:
    """Read a file's rows.

    :param name: Of the file.
    :raises AvqaError: if no row is usable, or a row lacks the field of ``--split_by`` or ``--thinking_field``.
    """
    records = records_of(Path(name), Path(args.audio_dir))
    doubt = counts_from_one(records) if args.answers_from is None else None
    if doubt:
        raise AvqaError(f"{name}: {doubt}. Say which it is: --answers_from 1, or --answers_from 0")
    rows, bad = parse_records(records, args.enable_think, args.answers_from or 0)
    if args.pretrain and rows:
        long = too_long(rows, args.pretrain, args.prompt_max_len)
        bad = sorted([*bad, *long], key=lambda problem: problem.index)
        left = {problem.index for problem in long}
        rows = [row for row in rows if row.index not in left]
    if bad:
        say_rows(f"{len(bad)} of {len(records)} rows of {name} cannot be used and are left out", bad)
    if not rows:
        raise AvqaError(f"{name}: no usable row among {len(records)}; one looks like {ROW}")
    for flag, into in (("split_by", "group"), ("thinking_field", "thinking")):
        if field := getattr(args, flag):
            rows = read_field(rows, records, field, f"--{flag}", into)
    resolve = make_resolver(args.audio_dir)
    source = Source(name, rows, [resolve(row.audio_name) for row in rows], bad, len(records))
    if args.confine_audio and (outside := confinement_problems(rows, source.paths, args.audio_dir)):
        say_rows(f"{len(outside)} rows lead out of --audio_dir and are left out (--confine_audio)", outside)
        source.bad = sorted([*bad, *outside], key=lambda problem: problem.index)
        source.leave_out(outside, f"--confine_audio: no row is left; is --audio_dir {args.audio_dir} the right folder?")
    return source


def too_long(rows: list[Row], pretrain: str, limit: int) -> list[Problem]:
    """One problem for each row whose prompt has more tokens than training takes.

    :param pretrain: Folder or hub name of the model, whose processor renders and counts.
    :param limit: Most tokens, as ``train_colocate.py --prompt_max_len``.
    :raises AvqaError: if the model's processor cannot be loaded.
    """
    try:
        processor = family_named(pretrain).processor_class().from_pretrained(pretrain)
        audio = {"type": "audio", "audio_url": "audio"}
        chats = [[{"role": "user", "content": [audio, {"type": "text", "text": row.prompt}]}] for row in rows]
        lengths = prompt_lengths(processor.tokenizer, [render_chat(processor, chat) for chat in chats])
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise AvqaError(f"--pretrain {pretrain}: its processor cannot be loaded: {error}") from error
    reason = "{} prompt tokens, more than --prompt_max_len {}"
    return [
        Problem(row.line, row.index, row.id, "prompt_too_long", reason.format(length, limit))
        for row, length in zip(rows, lengths, strict=True)
        if length > limit
    ]


def make_resolver(audio_dir: str) -> Callable[[str], str]:
    """Make the function from a row's audio name to an absolute path.

    It leaves absolute names as they are. Others become ``audio_dir/<relative path>``, but ``audio_dir/<file name>``
    where only that file exists, or neither does the folder of the relative path. A path of Windows is read as one.
    """
    root = os.path.abspath(audio_dir)

    # Asked once a folder and not once a file: 38,000 questions to a network file system take minutes.
    @functools.cache
    def existing_folder(relative: str) -> str | None:
        folder = os.path.normpath(os.path.join(root, relative))
        return folder if folder != root and os.path.isdir(folder) else None

    def resolve(name: str) -> str:
        if os.path.isabs(name):
            return name
        relative, file_name = os.path.split(name)
        folder = existing_folder(relative) if relative else None
        alone = os.path.join(root, file_name)
        if folder is not None:
            path = os.path.join(folder, file_name)
            return path if os.path.isfile(path) or not os.path.isfile(alone) else alone
        if "\\" in name and not os.path.isfile(alone):
            return resolve(name.replace("\\", "/").lstrip("/"))
        return alone

    return resolve


def confinement_problems(rows: list[Row], paths: list[str], folder: str) -> list[Problem]:
    """One problem for each row whose audio lies outside the folder, links resolved."""
    problems = []
    for row, path in zip(rows, paths, strict=True):
        if where := escape_of(path, folder):
            reason = f"audio_path {show_value(row.audio_name)} leads to {where}, outside --audio_dir {folder}"
            problems.append(Problem(row.line, row.index, row.id, "audio_outside", reason))
    return problems


def probe(args: argparse.Namespace, paths: list[str]) -> dict[str, Clip]:
    """What is known of the audio files, by path; empty with ``--no_check_audio``."""
    if args.no_check_audio:
        return {}
    from aqa.audio.reader import AudioReader

    reader = AudioReader(args.sandbox_audio, seconds=args.audio_seconds)
    clips = probe_clips(paths, args.num_workers, functools.partial(probe_clip, reader=reader))
    reader.close()
    return clips


def audio_problems(rows: list[Row], paths: list[str], clips: dict[str, Clip]) -> list[Problem]:
    """One problem for each row whose audio is missing or unreadable."""
    problems = []
    for row, path in zip(rows, paths, strict=True):
        clip = clips.get(path)
        if clip is not None and clip.kind is not None:
            # the path is the last that was tried: the file name alone, where a row names a folder, too
            tried = clip.kind == "audio_missing" and not path.endswith(os.path.normpath(row.audio_name))
            reason = clip.reason + (f", nor {show_value(row.audio_name)} in --audio_dir" if tried else "")
            problems.append(Problem(row.line, row.index, row.id, clip.kind, reason))
    return problems


def split(args: argparse.Namespace, sources: list[Source]) -> tuple[list[int], list[int]]:
    """Numbers of the training and of the validation rows, counted over all sources.

    Files of the same content are one clip. No clip, and with ``--split_by`` no group, is in both parts.

    :raises AvqaError: if a part would be empty, or ``--val_file`` has a clip or group of the other file.
    """
    paths = [os.path.normpath(path) for source in sources for path in source.paths]
    if not args.val_ratio and not args.val_file:
        return list(range(len(paths))), []
    copies = {} if args.no_check_audio else first_copies(paths, args.num_workers)
    clips = [copies.get(path, path) for path in paths]
    groups = [row.group for source in sources for row in source.rows] if args.split_by else paths
    joined = join_groups(groups, clips)
    if not args.val_file:
        train, validation = split_by_clip(joined, args.val_ratio, args.seed, args.split_by)
    else:
        count = len(sources[0].rows)
        train, validation = list(range(count)), list(range(count, len(paths)))
        if both := set(joined[:count]) & set(joined[count:]):
            refuse_shared(args, sources, paths, joined, both)
    if args.split_by:
        say_groups(args, groups, joined, train, validation)
    return train, validation


def refuse_shared(
    args: argparse.Namespace, sources: list[Source], paths: list[str], joined: list[str], both: set[str]
) -> None:
    """Refuse a ``--val_file`` with clips or groups of the training rows.

    :param joined: The group of every row of both files; ``both`` are those that both files have.
    :raises AvqaError: always; names the first of them.
    """
    first = {group: number for number, group in reversed(list(enumerate(joined)))}
    rows = [row for source in sources for row in source.rows]
    lines = []
    for number in range(len(sources[0].rows), len(rows)):
        if joined[number] in both:
            twin = first[joined[number]]
            of_one_group = args.split_by and rows[twin].group == rows[number].group
            same = "file" if paths[twin] == paths[number] else args.split_by if of_one_group else "content"
            lines.append(
                f"line {rows[number].line}: {paths[number]}: the same {same} as {paths[twin]}, line {rows[twin].line} "
                "of --input_jsonl"
            )
    title = f"--val_file {args.val_file}: {len(lines)} rows are not new to a model that was trained on --input_jsonl"
    raise AvqaError(several(title, lines, 3))


def say_groups(
    args: argparse.Namespace, groups: list[str], joined: list[str], train: list[int], validation: list[int]
) -> None:
    """Tell how groups were split, and how near the parts came to what was asked for."""
    parts = [len({groups[i] for i in part}) for part in (train, validation)]
    say(f"split by {args.split_by}: {parts[0]} values of it in training, {parts[1]} in validation, none in both")
    if merged := len(set(groups)) - len(set(joined)):
        say(f"  values that were kept together with another one, because they share a recording: {merged}")
    if not args.val_file:
        share = len(validation) / len(groups)
        say(f"  validation: {args.val_ratio:.1%} of the rows were asked for, {share:.1%} are in it")


def write(
    args: argparse.Namespace, sources: list[Source], train: list[int], validation: list[int], clips: dict[str, Clip]
) -> None:
    """Write all files, or none.

    :param train: Numbers of the training rows, counted over all sources; ``validation`` likewise.
    """
    import pyarrow.parquet as pq

    rows = [row for source in sources for row in source.rows]
    paths = [path for source in sources for path in source.paths]
    table = build_table(rows, paths, THINK_LABEL if args.enable_think else PLAIN_LABEL)
    parts = {"train": [paths[i] for i in train], "validation": [paths[i] for i in validation]}
    report = build_report(vars(args), sources, parts, clips)
    tables = {TRAIN_FILE: table}
    if validation:
        tables = {TRAIN_FILE: table.take(train), VALIDATION_FILE: table.take(validation)}
    writers = {name: functools.partial(pq.write_table, part) for name, part in tables.items()}
    writers[REPORT_FILE] = functools.partial(dump_json, report)
    if validation:
        held_out = [as_question(rows[i], paths[i]) for i in validation]
        writers[QUESTIONS_FILE] = functools.partial(dump_json, held_out)
    # The old validation.parquet is always removed first. A run that is killed between two files then leaves one file
    # too few, which is noticed, and never an old and a new part that share a clip, which is not.
    stale = os.path.lexists(os.path.join(args.local_save_dir, VALIDATION_FILE))
    folder = Path(args.local_save_dir)
    write_files(folder, f"--local_save_dir {folder}", writers, obsolete=[VALIDATION_FILE, QUESTIONS_FILE])
    say_summary(args.local_save_dir, report, removed=stale and not validation)
    one_value = "; a type whose rows have only one value of --split_by needs another field" if args.split_by else ""
    remedy = "" if args.val_file else f"\n  Try another --seed{one_value}."
    say_frequent_answers([rows[i] for i in train])
    say_types([rows[i] for i in train], [rows[i] for i in validation], remedy)


def build_report(settings: dict, sources: list[Source], parts: dict[str, list[str]], clips: dict[str, Clip]) -> dict:
    """Count what was read, written and left out.

    Every row read is written, bad, or left out for its audio. Hours and durations (seconds) are those of the readable
    files that the written rows refer to, each file once; null where no file was looked at.

    :param settings: The settings of the run, by flag.
    :param parts: The audio file of every row written, by part (``train``, ``validation``).
    :param clips: What is known of the files, by path; empty where they were not looked at.
    """
    checked = not settings["no_check_audio"]
    bad, unheard = ([p for source in sources for p in getattr(source, name)] for name in ("bad", "unheard"))
    kinds = Counter(problem.kind for problem in unheard)
    problems = [
        {"file": source.file, **problem._asdict()}
        for source in sources
        for problem in sorted([*source.bad, *source.unheard], key=lambda problem: problem.index)
    ]
    return {
        "settings": settings,
        "rows": {
            "read": sum(source.read for source in sources),
            "written": sum(map(len, parts.values())),
            **{part: len(paths) for part, paths in parts.items()},
            "bad": len(bad),
            "bad_by_reason": dict(Counter(problem.kind for problem in bad).most_common()),
            "left_out_for_audio": len(unheard) if settings["skip_bad"] else 0,
            **{f"audio_{kind}": kinds[f"audio_{kind}"] if checked else None for kind in BAD_AUDIO},
        },
        "clips": count_clips(parts, clips, checked, settings["audio_seconds"]),
        "problems": problems,
    }


def count_clips(parts: dict[str, list[str]], clips: dict[str, Clip], checked: bool, limit: float) -> dict:
    """The part of the report about the files; parameters as for :func:`build_report`.

    :param limit: ``--audio_seconds``.
    """
    used = {path for paths in parts.values() for path in paths}
    kinds = Counter(clip.kind for clip in clips.values())
    heard = [clip for path, clip in clips.items() if path in used and clip.kind is None]
    seconds = sorted(clip.seconds for clip in heard)
    rates = Counter(clip.sampling_rate for clip in heard)
    train, validation = ({os.path.normpath(path) for path in parts[part]} for part in ("train", "validation"))
    return {
        "checked": checked,
        "train": len(train),
        "validation": len(validation),
        "in_both_parts": len(train & validation),
        **{kind: kinds[f"audio_{kind}"] if checked else None for kind in BAD_AUDIO},
        "readable": len(heard) if checked else None,
        "hours": round(sum(seconds) / 3600, 6) if checked else None,
        "seconds_min": seconds[0] if seconds else None,
        "seconds_median": (seconds[(len(seconds) - 1) // 2] + seconds[len(seconds) // 2]) / 2 if seconds else None,
        "seconds_max": seconds[-1] if seconds else None,
        "longer_than_audio_seconds": sum(length > limit for length in seconds) if checked else None,
        "sampling_rates": {str(rate): number for rate, number in sorted(rates.items())},
    }


def dump_json(value: dict | list, file: BinaryIO) -> None:
    file.write(json.dumps(value, indent=1, allow_nan=False).encode("ascii"))


def say_rows(headline: str, problems: list[Problem]) -> None:
    """Warn of rows with problems."""
    lines = [f"line {problem.line}: {problem.kind}: {problem.reason}" for problem in problems]
    say_problems(headline, [problem.kind for problem in problems], lines)


def say_types(train: list[Row], validation: list[Row], remedy: str) -> None:
    """Tell how many rows there are of each question type, and warn of the types whose split measures nothing.

    :param remedy: How to split otherwise.
    """
    trained, held_out = (Counter(row.question_type for row in part) for part in (train, validation))
    kinds = (trained + held_out).most_common()
    if [kind for kind, _ in kinds] != [""]:
        named = [f"{kind or 'none'} {number}" for kind, number in kinds[:8]]
        say(f"  question types: {', '.join(named)}{', ...' if len(kinds) > 8 else ''}")
    if not validation:
        return
    lines = []
    for kind, _ in kinds:
        golds, others = ({row.gold for row in part if row.question_type == kind} for part in (validation, train))
        alike = len(golds) == 1 and others > golds
        if alike or not (golds and others):
            text = f"{kind or 'none'}: {trained[kind]} rows in training, {held_out[kind]} in validation"
            lines.append(f"{text}, which all have the answer {show_value(*golds)}" if alike else text)
    if lines:
        say(several("WARNING: held-out rows cannot show what is learned of these question types", lines, 8) + remedy)


def say_frequent_answers(rows: list[Row]) -> None:
    """Warn of question types of which one answer is right in most training rows, and far more often than by chance."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.question_type, []).append(row)
    lines = []
    for kind, alike in kinds.items():
        [(gold, count)] = Counter(row.gold for row in alike).most_common(1)
        guessed = sum(1 / len(row.choices) for row in alike)
        if len(alike) >= 20 and count > max(len(alike) / 2, 1.5 * guessed):
            lines.append(f"{kind or 'no type'}: {show_value(gold)} in {count} of {len(alike)} rows")
    if lines:
        title = "WARNING: one answer is right in most training rows of a question type, and a model could learn it "
        say(several(f"{title}instead of listening; balance the answers", lines, 8))


def say_summary(folder: str, report: dict, removed: bool) -> None:
    """Tell what was written.

    :param removed: Whether an earlier run's validation.parquet was removed without replacement.
    """
    rows, clips = report["rows"], report["clips"]
    say(f"read {rows['read']} rows, wrote {rows['written']} to {folder}:")
    say(f"  {TRAIN_FILE}: {rows['train']} rows on {clips['train']} clips")
    if rows["validation"]:
        shared = f"{clips['in_both_parts']} clips in both"
        say(f"  {VALIDATION_FILE}: {rows['validation']} rows on {clips['validation']} clips, {shared}")
        say(f"  {QUESTIONS_FILE}: the same rows for eval_mmau.py --data_file")
    elif removed:
        say(f"  {VALIDATION_FILE} of an earlier run was removed, since --val_ratio is 0")
    if clips["readable"]:
        low, median, high = (clips[f"seconds_{name}"] for name in ("min", "median", "max"))
        rates = ", ".join(f"{rate} Hz: {number}" for rate, number in clips["sampling_rates"].items())
        lengths = f"{low:.2f} to {high:.2f} s (median {median:.2f} s)"
        say(f"  audio: {clips['readable']} files, {clips['hours']:.2f} h, {lengths}; {rates}")
        if long := clips["longer_than_audio_seconds"]:
            heard = report["settings"]["audio_seconds"]
            say(f"  longer than {heard:g} s: {long}, of which the first {heard:g} s are heard (--audio_seconds)")
    elif not clips["checked"]:
        say("  audio: not checked (--no_check_audio)")
    say(f"  {REPORT_FILE}: all counts, and all problems ({len(report['problems'])})")
