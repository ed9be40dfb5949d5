"""
Prepare AVQA for GRPO: R1-AQA's JSON lines, or the raw AVQA array, become LightRFT's parquet.

    python examples/r1_aqa/data_preprocess/avqa.py \\
        --input_jsonl data/AVQA/train_qa.data --audio_dir data/AVQA/audios --local_save_dir ~/data/avqa_lightrft

Written are ``train.parquet``, with ``--val_ratio`` also ``validation.parquet``, and ``report.json``: what was read,
what was left out and why, and what the audio is like. Files are replaced only once every new one is complete.

Rows that cannot be used (malformed JSON, missing fields, an answer out of range, ...) are left out. Rows whose audio is
missing or unreadable are kept, because data is often prepared where the sound is not; both are reported.
``--skip_bad`` leaves the latter out too, ``--strict`` stops at either.
"""

import argparse
import functools
import gc
import importlib
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from typing import BinaryIO

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where the package aqa is

from aqa.audio.probe import Clip, probe_clip, probe_clips
from aqa.audio.sandbox import escape_of
from aqa.data.parquet import build_report, build_table, integers, write_files
from aqa.data.rows import (
    AvqaError,
    Problem,
    Record,
    Row,
    RowError,
    parse_record,
    parse_records,
    read_records,
    render_prompt,
    show_value,
    split_by_clip,
    wav_name_of_video,
)

__all__ = [
    "AvqaError",
    "Clip",
    "Problem",
    "Record",
    "Row",
    "RowError",
    "build_report",
    "build_table",
    "main",
    "make_resolver",
    "parse_record",
    "parse_records",
    "probe_clip",
    "probe_clips",
    "read_records",
    "render_prompt",
    "split_by_clip",
    "wav_name_of_video",
    "write_files",
]

LABEL = "avqa_rule"
THINK_LABEL = "avqa_think_rule"
TRAIN_FILE, VALIDATION_FILE, REPORT_FILE = "train.parquet", "validation.parquet", "report.json"
QUESTIONS_FILE = "validation.json"
SHOWN_PROBLEMS = 20
EXIT_STATUS = (
    "exit status: 0 written; 2 nothing written: wrong use, wrong data or a file that cannot be read or written, the "
    "message says which;\n130 interrupted, nothing written; 1 a fault of this program, with its traceback"
)
REMEDY_NO_ROW = "see R1-AQA's README for the fields of a row: id, question_text, multi_choice, answer, audio_path"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """
    :param argv: Arguments, those of the process if None.
    :type argv: list[str] | None
    :return: The settings, paths absolute.
    :rtype: argparse.Namespace
    :raises AvqaError: naming every setting that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="avqa.py",
        description=__doc__,
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, too")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input_jsonl", required=True, help="R1-AQA's JSON lines or the raw AVQA JSON array, told apart by themselves"
    )
    files.add_argument(
        "--audio_dir",
        required=True,
        help="folder of the sounds: a relative audio_path is looked up in it, then its file name alone is; an absolute "
        "audio_path is taken as it is",
    )
    files.add_argument(
        "--local_save_dir", required=True, help="folder for the parquet files and report.json, made if missing"
    )
    files.add_argument(
        "--val_ratio",
        type=float,
        default=0.0,
        help="share of rows for validation.parquet, 0 <= ratio < 1; no clip is in both parts (default: 0, which "
        "removes the validation.parquet of an earlier run)",
    )
    files.add_argument("--seed", type=int, default=42, help="decides which clips are for validation (default: 42)")
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--enable_think",
        action="store_true",
        help=f"ask for <think> </think> before the answer, and label the rows {THINK_LABEL} instead of {LABEL}",
    )
    checks = parser.add_argument_group("checks")
    checks.add_argument(
        "--no_check_audio",
        action="store_true",
        help="do not open the audio files: quicker, but nothing is known of them",
    )
    checks.add_argument(
        "--decode_audio",
        action="store_true",
        help="decode what the model will hear of every file, not only its header: finds damaged samples and digital "
        "silence now, at which training would stop later (some milliseconds a file)",
    )
    checks.add_argument(
        "--confine_audio",
        action="store_true",
        help="a row whose audio lies outside --audio_dir, by an absolute path, by .. or by a link, cannot be used; for "
        "data that is not trusted",
    )
    checks.add_argument(
        "--sandbox_audio",
        action="store_true",
        help="read audio files in a process of its own, with limits of memory and time; for data that is not trusted",
    )
    checks.add_argument(
        "--num_workers",
        type=int,
        default=min(32, 4 * (os.cpu_count() or 1)),
        help="how many audio files are probed at a time (default: %(default)s)",
    )
    either = checks.add_mutually_exclusive_group()
    either.add_argument(
        "--skip_bad", action="store_true", help="leave out rows whose audio is missing or unreadable, too"
    )
    either.add_argument(
        "--strict",
        action="store_true",
        help="write nothing if there is any unusable row, or missing or unreadable audio",
    )
    args = parser.parse_args(argv)
    for name in ("input_jsonl", "audio_dir", "local_save_dir"):
        setattr(args, name, os.path.abspath(os.path.expanduser(getattr(args, name))))
    if problems := check_args(args):
        raise AvqaError("\n  ".join(["these settings cannot be used:", *problems]))
    return args


def check_args(args: argparse.Namespace) -> list[str]:
    """
    :param args: The settings.
    :type args: argparse.Namespace
    :return: One message for each setting that cannot be used, with value and remedy.
    :rtype: list[str]
    """
    problems = []
    if not os.path.exists(args.input_jsonl):
        problems.append(f"--input_jsonl {args.input_jsonl}: no such file; R1-AQA's README says how to make it")
    elif os.path.isdir(args.input_jsonl):
        problems.append(f"--input_jsonl {args.input_jsonl}: a folder; name the file in it")
    # A folder that does not exist is no error: then all audio is missing, and that is reported as such.
    if os.path.exists(args.audio_dir) and not os.path.isdir(args.audio_dir):
        problems.append(f"--audio_dir {args.audio_dir}: not a folder; name the one that holds the .wav files")
    try:
        args.audio_dir.encode("utf-8")
    except UnicodeEncodeError:
        problems.append(f"--audio_dir {args.audio_dir!a}: not UTF-8, parquet cannot hold it; rename or link the folder")
    if os.path.exists(args.local_save_dir) and not os.path.isdir(args.local_save_dir):
        problems.append(f"--local_save_dir {args.local_save_dir}: not a folder; choose another name")
    for name in (TRAIN_FILE, VALIDATION_FILE, REPORT_FILE):
        target = os.path.join(args.local_save_dir, name)
        if os.path.isdir(target):
            problems.append(f"--local_save_dir {args.local_save_dir}: {name} in it is a folder; move it away")
        elif os.path.exists(args.input_jsonl) and os.path.exists(target) and os.path.samefile(target, args.input_jsonl):
            problems.append(f"--local_save_dir {args.local_save_dir}: {name} in it is the input; choose another folder")
    if not 0 <= args.val_ratio < 1:  # false for NaN as well
        problems.append(f"--val_ratio {args.val_ratio}: expected 0 <= ratio < 1, for example 0.02")
    if args.num_workers < 1:
        problems.append(f"--num_workers {args.num_workers}: expected at least 1")
    if args.skip_bad and args.no_check_audio:
        problems.append("--skip_bad with --no_check_audio: which audio is bad is not known without the check; drop one")
    for flag in ("decode_audio", "sandbox_audio"):
        if getattr(args, flag) and args.no_check_audio:
            problems.append(f"--{flag} with --no_check_audio: no audio file is opened then; drop one")
    return problems


def make_resolver(audio_dir: str) -> Callable[[str], str]:
    """
    :param audio_dir: Folder of the sounds.
    :type audio_dir: str
    :return: Function from a row's audio name to an absolute path: absolute names as they are, else
        ``audio_dir/<relative path>`` where that file exists, else ``audio_dir/<file name>``.
    :rtype: Callable[[str], str]
    """
    root = os.path.abspath(audio_dir)

    # Asking once a folder instead of once a file: 38,000 questions to a network file system take minutes.
    @functools.cache
    def existing_folder(relative: str) -> str | None:
        folder = os.path.normpath(os.path.join(root, relative))
        return folder if folder != root and os.path.isdir(folder) else None

    def resolve(name: str) -> str:
        if os.path.isabs(name):
            return name
        relative, file_name = os.path.split(name)
        folder = existing_folder(relative) if relative else None
        if folder is not None and os.path.isfile(path := os.path.join(folder, file_name)):
            return path
        return os.path.join(root, file_name)

    return resolve


def confinement_problems(rows: list[Row], paths: list[str], folder: str) -> list[Problem]:
    """
    :param rows: The usable rows (rows).
    :type rows: list[Row]
    :param paths: The audio file of each (rows).
    :type paths: list[str]
    :param folder: Where all audio must lie, links resolved.
    :type folder: str
    :return: One problem for each row whose audio lies elsewhere.
    :rtype: list[Problem]
    """
    problems = []
    for row, path in zip(rows, paths, strict=True):
        if where := escape_of(path, folder):
            reason = f"audio_path {show_value(row.audio_name)} leads to {where}, outside --audio_dir {folder}"
            problems.append(Problem(row.line, row.index, row.id, "audio_outside", reason))
    return problems


def audio_problems(rows: list[Row], paths: list[str], clips: dict[str, Clip]) -> list[Problem]:
    """
    :param rows: The usable rows (rows).
    :type rows: list[Row]
    :param paths: The audio file of each (rows).
    :type paths: list[str]
    :param clips: What is known of the files, by path; empty where they were not looked at.
    :type clips: dict[str, Clip]
    :return: One problem for each row whose audio is missing or unreadable.
    :rtype: list[Problem]
    """
    problems = []
    for row, path in zip(rows, paths, strict=True):
        clip = clips.get(path)
        if clip is not None and clip.kind is not None:
            problems.append(Problem(row.line, row.index, row.id, clip.kind, clip.reason))
    return problems


def say(text: str) -> None:
    """
    Print a line for the person who watches.

    :param text: The line. It goes to stderr, whose error handler prints any file name, whatever the locale.
    :type text: str
    """
    print(text, file=sys.stderr, flush=True)


def say_problems(headline: str, problems: list[Problem]) -> None:
    """
    :param headline: What these have in common.
    :type headline: str
    :param problems: The problems; the first ones are shown, the others are in the report.
    :type problems: list[Problem]
    """
    counts = ", ".join(f"{kind} {n}" for kind, n in Counter(problem.kind for problem in problems).most_common())
    say(f"WARNING: {headline}: {counts}")
    for problem in problems[:SHOWN_PROBLEMS]:
        say(f"  line {problem.line}: {problem.kind}: {problem.reason}")
    if len(problems) > SHOWN_PROBLEMS:
        say(f"  ... and {len(problems) - SHOWN_PROBLEMS} more")


def need(module: str) -> None:
    """
    :param module: A package that the run will want later: better missed now than after half an hour of probing.
    :type module: str
    :raises AvqaError: with the command that installs it.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        hint = "" if module == "pyarrow" else ", or leave the audio unchecked with --no_check_audio"
        raise AvqaError(f"{module} cannot be imported ({error}). Install it: pip install {module}{hint}") from error


def convert(args: argparse.Namespace) -> None:
    """
    Read, check, split, write, report.

    :param args: The settings.
    :type args: argparse.Namespace
    :raises AvqaError: if nothing is to be written; the save folder is then as before.
    :raises OSError: if a file cannot be read or written.
    """
    for module in (
        ["pyarrow"]
        if args.no_check_audio
        else ["pyarrow", "soundfile", "numpy", "tqdm", *(["soxr"] if args.decode_audio else [])]
    ):
        need(module)
    with open(args.input_jsonl, "rb") as file:
        records = read_records(file.read(), args.input_jsonl)
    rows, bad = parse_records(records, args.enable_think)
    if bad:
        say_problems(f"{len(bad)} of {len(records)} rows of {args.input_jsonl} cannot be used and are left out", bad)
    if not rows:
        raise AvqaError(f"{args.input_jsonl}: no usable row among {len(records)}; {REMEDY_NO_ROW}")

    resolve = make_resolver(args.audio_dir)
    paths = [resolve(row.audio_name) for row in rows]
    if args.confine_audio and (outside := confinement_problems(rows, paths, args.audio_dir)):
        say_problems(f"{len(outside)} rows lead out of --audio_dir and are left out (--confine_audio)", outside)
        bad = sorted([*bad, *outside], key=lambda problem: problem.index)
        escaped = {problem.index for problem in outside}
        kept = [(row, path) for row, path in zip(rows, paths, strict=True) if row.index not in escaped]
        if not kept:
            raise AvqaError(f"--confine_audio: no row is left; is --audio_dir {args.audio_dir} the right folder?")
        rows, paths = map(list, zip(*kept, strict=True))
    clips = {}
    if not args.no_check_audio:
        from aqa.audio.reader import AudioReader

        reader = AudioReader(args.sandbox_audio)
        probe = functools.partial(probe_clip, decode=args.decode_audio, reader=reader)
        clips = probe_clips(paths, args.num_workers, probe)
        reader.close()
    silent = audio_problems(rows, paths, clips)
    if silent:
        fate = "left out" if args.skip_bad else "KEPT: training will stop at them unless the audio is there by then"
        say_problems(f"the audio of {len(silent)} rows is missing or unreadable; they are {fate}", silent)
        say(f"  Looked in --audio_dir {args.audio_dir}; --skip_bad leaves such rows out.")
    if args.strict and (bad or silent):
        raise AvqaError(
            f"--strict: {len(bad)} unusable rows, {len(silent)} rows without audio. Repair them, or drop --strict"
        )
    if args.skip_bad:
        silent_rows = {problem.index for problem in silent}
        kept = [(row, path) for row, path in zip(rows, paths, strict=True) if row.index not in silent_rows]
        if not kept:
            raise AvqaError(f"--skip_bad: none of the {len(rows)} rows has readable audio; check --audio_dir")
        rows, paths = map(list, zip(*kept, strict=True))
    train, validation = split_by_clip(paths, args.val_ratio, args.seed)
    split = {TRAIN_FILE: train, VALIDATION_FILE: validation}

    import pyarrow.parquet as pq

    table = build_table(rows, paths, THINK_LABEL if args.enable_think else LABEL)
    parts = {"train": [paths[i] for i in train], "validation": [paths[i] for i in validation]}
    report = build_report(vars(args), len(records), bad, silent, parts, clips)
    tables = {TRAIN_FILE: table}
    if validation:
        tables = {name: table.take(integers(part, "q")) for name, part in split.items()}
    writers = {name: functools.partial(pq.write_table, part) for name, part in tables.items()}
    writers[REPORT_FILE] = functools.partial(dump_json, report)
    if validation:
        writers[QUESTIONS_FILE] = functools.partial(dump_json, questions([rows[i] for i in validation], parts))
    # The old validation.parquet goes first in any case: a run killed between two files then leaves one part too few,
    # which is noticed, and never an old and a new part that share a clip, which is not.
    stale = os.path.lexists(os.path.join(args.local_save_dir, VALIDATION_FILE))
    write_files(args.local_save_dir, writers, obsolete=[VALIDATION_FILE, QUESTIONS_FILE])
    say_summary(args.local_save_dir, report, removed=stale and not validation)


def questions(rows: list[Row], parts: dict[str, list[str]]) -> list[dict]:
    """
    :param rows: Those held out.
    :type rows: list[Row]
    :param parts: The audio files of each part.
    :type parts: dict[str, list[str]]
    :return: The rows as MMAU's questions, which ``eval_mmau.py`` reads.
    :rtype: list[dict]
    """
    return [
        {
            "id": str(row.id),
            "audio_id": path,
            "question": row.question,
            "choices": row.choices,
            "answer": row.gold,
            "dataset": row.dataset_name,
            "task": row.question_type or row.dataset_name,
        }
        for row, path in zip(rows, parts["validation"], strict=True)
    ]


def dump_json(value: dict | list, file: BinaryIO) -> None:
    """
    :param value: What to write.
    :type value: dict | list
    :param file: Open binary file.
    :type file: BinaryIO
    """
    file.write(json.dumps(value, indent=1, allow_nan=False).encode("ascii"))


def say_summary(folder: str, report: dict, removed: bool) -> None:
    """
    :param folder: Where the files are.
    :type folder: str
    :param report: The report.
    :type report: dict
    :param removed: Whether an earlier run's validation.parquet was removed without replacement.
    :type removed: bool
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
    elif not clips["checked"]:
        say("  audio: not checked (--no_check_audio)")
    say(f"  {REPORT_FILE}: all counts and {len(report['problems'])} problems")


def main(argv: list[str] | None = None) -> int:
    """
    :param argv: Arguments, those of the process if None.
    :type argv: list[str] | None
    :return: Exit status: 0 written, 2 nothing written, 130 interrupted.
    :rtype: int
    """
    try:
        convert(parse_args(argv))
    except (AvqaError, OSError) as error:
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        say(f"avqa.py: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("avqa.py: interrupted, nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    gc.disable()  # a short process whose many objects form no cycles: looking for some costs a tenth of its time
    sys.exit(main())
