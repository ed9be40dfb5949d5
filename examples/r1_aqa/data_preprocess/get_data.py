#!/usr/bin/env python3
"""Make what avqa.py and eval_mmau.py read out of what you have downloaded. Nothing is downloaded here.

AVQA, for training
  1. The questions, train_qa.json and val_qa.json: from AVQA's site, mn.cs.tsinghua.edu.cn/avqa, section Downloads
     (its repository is github.com/AlyssaYoung/AVQA).
  2. The videos: VGG-Sound's, 10 s each, as that section says; files named <youtube id>_<second>.mp4 in any folders.
     A part of them is gone from YouTube: R1-AQA trained on 38,000 of the 40,000 questions.
  3. python examples/r1_aqa/data_preprocess/get_data.py avqa --questions train_qa.json --media VIDEOS \\
         --out_dir data/AVQA
     ffmpeg takes the sound out of each video that a question is about. The next command is printed.

MMAU test-mini, for evaluation
  1. mmau-test-mini.json from the repository github.com/Sakshi113/MMAU, and test-mini-audios.tar.gz, which its README
     links to.
  2. python examples/r1_aqa/data_preprocess/get_data.py mmau --questions mmau-test-mini.json \\
         --archive test-mini-audios.tar.gz --out_dir data/mmau
     It unpacks the recordings and checks that every question has its own. MMAR goes the same way.
  Or 1. the parquet files of MMAU, which hold questions and recordings;
     2. python examples/r1_aqa/data_preprocess/get_data.py mmau --questions FILE_OR_FOLDER.parquet --out_dir data/mmau
     It writes questions.json and the recordings, for eval_mmau.py and avqa.py.

Both may be interrupted, or killed: the same command goes on. Both write OUT_DIR/report.json: what is there, what is
missing, what is broken and why.
"""

import argparse
import json
import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))  # the folder of the package aqa

from aqa.common.arguments import Parser, shell_command  # noqa: E402
from aqa.common.console import progress, say, say_problems  # noqa: E402
from aqa.common.files import explain, write_atomically  # noqa: E402
from aqa.common.lock import lock  # noqa: E402
from aqa.common.versions import require  # noqa: E402
from aqa.data.embedded_audio import TakenOut, embedded_rows, parquet_files, take_out  # noqa: E402
from aqa.data.extract_audio import ExtractError, extract_all, index_media, missing_tools  # noqa: E402
from aqa.data.rows import AvqaError, counts_from_one, parse_records, read_records  # noqa: E402
from aqa.data.unpack_audio import UnpackError, is_safe, unpack  # noqa: E402

QUESTIONS = "questions.json"  # those that a parquet held
CLIP_BYTES = 320_000  # 10 s of 16 kHz, 16 bit
EXIT_STATUS = (
    "exit status: 0 done, though clips may be missing (the report lists them); 2 wrong use, wrong data or a file that "
    "cannot be\nread or written, the message says what to put right; 130 interrupted; 1 a fault of this program, with "
    "its traceback"
)


class DataError(ValueError):
    """Something that the user can put right; the message names the place and the remedy."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags.

    :raises DataError: naming every setting that cannot be used.
    """
    kind: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXIT_STATUS}
    parser = Parser(prog="get_data.py", description=__doc__, **kind)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, too")
    commands = parser.add_subparsers(dest="command", required=True, metavar="avqa|mmau")
    avqa = commands.add_parser("avqa", help="sound out of AVQA's videos", description=__doc__, **kind)
    avqa.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        required=True,
        help="train_qa.json, val_qa.json, or R1-AQA's JSON lines; sound is made for the usable rows of all of them",
    )
    avqa.add_argument("--media", type=Path, required=True, help="folder of the videos, or of sounds, with subfolders")
    avqa.add_argument(
        "--num_workers",
        type=int,
        default=os.cpu_count() or 1,
        help="ffmpeg processes at a time (default: %(default)s, one a core)",
    )
    mmau = commands.add_parser("mmau", help="recordings out of MMAU's archive", description=__doc__, **kind)
    mmau.add_argument(
        "--questions",
        type=Path,
        required=True,
        help="mmau-test-mini.json, MMAR's JSON lines, or MMAU's parquet file or folder of parquet files",
    )
    mmau.add_argument("--archive", type=Path, help="tar.gz or zip of the recordings; without it --out_dir is checked")
    for command in (avqa, mmau):
        command.add_argument("--out_dir", type=Path, required=True, help="folder for the sounds and report.json")
    args = parser.parse_args(argv)
    if problems := find_problems(args):
        raise DataError("\n  ".join(["these settings cannot be used:", *problems]))
    return args


def find_problems(args: argparse.Namespace) -> list[str]:
    """One message for each setting that cannot be used, with value and remedy."""
    problems = []
    for path in args.questions if args.command == "avqa" else [args.questions]:
        if path.is_dir() and args.command == "mmau":
            if not parquet_files(path):
                problems.append(f"--questions {path}: a folder without *.parquet; name the file")
        elif not path.is_file():
            problems.append(f"--questions {path}: no such file; --help says where to download it")
    if args.out_dir.exists() and not args.out_dir.is_dir():
        problems.append(f"--out_dir {args.out_dir}: not a folder; choose another name")
    if args.command == "mmau":
        if args.archive is not None and not args.archive.is_file():
            problems.append(f"--archive {args.archive}: no such file; --help says where to download it")
        elif args.archive is not None and args.questions.exists() and parquet_files(args.questions):
            problems.append(f"--archive {args.archive}: the parquet of --questions holds the recordings; drop it")
        return problems
    if not args.media.is_dir():
        problems.append(f"--media {args.media}: no such folder; an archive must be unpacked first")
    if args.num_workers < 1:
        problems.append(f"--num_workers {args.num_workers}: must be 1 or more")
    if missing := missing_tools():
        problems.append(f"{' and '.join(missing)}: not on the PATH; apt-get install ffmpeg, or conda install ffmpeg")
    return problems


# ----------------------------------------------------------------------------------------------------------------- AVQA
def get_avqa(args: argparse.Namespace) -> None:
    """Make the sound of every usable row, write a report, print the next command.

    :raises DataError: if there is nothing to be had.
    """
    rows_of, unusable = count_rows(args.questions)
    media, others = index_media(args.media)
    found = sum(name in media for name in rows_of)
    say(f"{args.media}: files of {found} of the {len(rows_of)} clips asked for")
    audios = args.out_dir / "audios"
    if not found and not audios.is_dir():
        raise DataError(
            f"--media {args.media}: no file of a clip that is asked for, such as {next(iter(rows_of))!a}; files must "
            "be named <youtube id>_<second>.mp4 (or .webm, .wav, ...)"
        )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with lock(args.out_dir / ".lock", f"--out_dir {args.out_dir}"):
        audios.mkdir(exist_ok=True)
        if (free := shutil.disk_usage(audios).free) < found * CLIP_BYTES:
            say(f"WARNING: {found} clips of 10 s take {found * CLIP_BYTES / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        with progress("extracting", len(rows_of)) as advance:
            outcomes = extract_all(rows_of, media, audios, args.num_workers, advance)
        problems = [outcome for outcome in outcomes if outcome.kind is not None]
        lost = sum(rows_of[outcome.name] for outcome in problems)
        report = {
            "rows": {"usable": rows_of.total(), "unusable": unusable, "with_audio": rows_of.total() - lost},
            "clips": {
                "asked_for": len(rows_of),
                "there": len(rows_of) - len(problems),
                "there_before": sum(outcome.skipped for outcome in outcomes),
                **dict(Counter(outcome.kind for outcome in problems).most_common()),
            },
            "files_of_other_names": others,
            "problems": [{"rows": rows_of[problem.name], **problem._asdict()} for problem in problems],
        }
        write_report(args.out_dir, report)
    show_problems("clips are not there", [(o.name, o.kind, o.reason, o.source) for o in problems])
    say(
        f"{len(rows_of) - len(problems)} of {len(rows_of)} clips are in {audios}, for {rows_of.total() - lost} of "
        f"{rows_of.total()} rows ({1 - lost / rows_of.total():.1%}); all else is in {args.out_dir / 'report.json'}"
    )
    if len(problems) == len(rows_of):
        raise DataError("no clip is there, so there is nothing to train on")
    skip = ["--skip_bad"] if lost else []
    for path in args.questions:
        target = args.out_dir / ("parquet" if len(args.questions) == 1 else f"parquet_{path.stem}")
        source = ["--input_jsonl", path, "--audio_dir", audios]
        show_next("data_preprocess/avqa.py", *source, *skip, "--local_save_dir", target)


def count_rows(questions: Sequence[Path]) -> tuple[Counter[str], int]:
    """Read the files of questions.

    :return: Usable rows by the file name of their clip, and the number of unusable rows.
    :raises DataError: if a file has no usable row.
    """
    rows_of: Counter[str] = Counter()
    unusable = 0
    for path in questions:
        records = read_records(path.read_bytes(), str(path))
        first = int(counts_from_one(records) is not None)  # avqa.py asks which it is
        rows, bad = parse_records(records, enable_think=False, answers_from=first)
        if not rows:
            raise DataError(f"{path}: no usable row among {len(bad)}; is this a file of AVQA's questions?")
        say(f"{path}: {len(rows)} rows" + (f"; {len(bad)} more cannot be used, avqa.py says why" if bad else ""))
        rows_of.update(os.path.basename(row.audio_name) for row in rows)
        unusable += len(bad)
    return rows_of, unusable


# ----------------------------------------------------------------------------------------------------------------- MMAU
def get_mmau(args: argparse.Namespace) -> None:
    """Unpack and check the recordings of all questions, write a report, print the next command.

    :raises DataError: if a question names no usable path, or no recording is there.
    """
    from aqa.evaluation.items import read_rows

    source = parquet_files(args.questions)
    taken = write_embedded(source, args.out_dir) if source else TakenOut([], 0, [], {})
    file = args.out_dir / QUESTIONS if source else args.questions
    benchmark, rows = read_rows(file)
    names = list(dict.fromkeys(row.get(benchmark.audio_key) for row in rows))
    if unsafe := [name for name in names if not isinstance(name, str) or not is_safe(name)]:
        raise DataError(f"{file}: {benchmark.audio_key} {unsafe[0]!a} is no path below a folder")
    say(f"{benchmark.title}: {len(rows)} questions on {len(names)} recordings")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with lock(args.out_dir / ".lock", f"--out_dir {args.out_dir}"):
        if args.archive is not None:
            with progress("unpacking", len(names)) as advance:
                unpacked, others = unpack(args.archive, names, args.out_dir, advance)
            say(f"{args.archive}: {unpacked} recordings unpacked, {others} other entries passed over")
        problems = check_recordings(names, args.out_dir) | {n: ("broken", why) for n, why in taken.broken.items()}
        kinds = dict(Counter(kind for kind, _ in problems.values()))
        report = {
            "questions": len(rows),
            "rows_without_question": taken.unusable,
            "recordings": {"asked_for": len(names), "there": len(names) - len(problems), **kinds},
            "problems": [{"name": n, "kind": kind, "reason": why} for n, (kind, why) in problems.items()],
        }
        write_report(args.out_dir, report)
    show_problems("recordings are not there", [(n, kind, why, None) for n, (kind, why) in problems.items()])
    say(f"{len(names) - len(problems)} of {len(names)} recordings are in {args.out_dir}")
    if len(problems) == len(names):
        raise DataError("no recording is there; --archive unpacks them, --help says where to download it")
    source = ["--data_file", file, "--audio_dir", args.out_dir]
    skip = ["--skip_bad_audio"] if problems else []
    out = ["--out_file", f"results/{file.stem}{benchmark.suffixes[-1]}"]
    show_next("eval_mmau.py", "--model_path", "YOUR_MODEL", *source, *skip, *out, "--engine", "vllm")


def write_embedded(files: Sequence[Path], folder: Path) -> TakenOut:
    """Write the recordings and the questions of parquet files.

    :raises DataError: if no row gives a question.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"--out_dir {folder}"):
        with progress("writing", embedded_rows(files)) as advance:
            taken = take_out(files, folder, advance)
        if taken.unusable:
            title = f"{len(taken.unusable)} rows give no question and are left out"
            say_problems(title, ["no_question"] * len(taken.unusable), taken.unusable)
        if not taken.questions:
            raise DataError(f"{files[0]}: no row gives a question")
        write_atomically(folder / QUESTIONS, json.dumps(taken.questions, indent=1))
    say(f"{taken.written} recordings written, {len(taken.questions)} questions are in {folder / QUESTIONS}")
    return taken


def check_recordings(names: Sequence[str], folder: Path) -> dict[str, tuple[str, str]]:
    """Decode all recordings.

    :return: For each that is missing or broken, which of the two it is, and why.
    """
    from aqa.audio.decode import AudioError, load_audio
    from aqa.audio.probe import probe_clips

    def check(name: str) -> tuple[str, str] | None:
        path = folder / name
        try:
            load_audio(path, silence_ok=True)
        except AudioError as error:
            return ("broken" if path.exists() else "missing"), str(error)
        return None

    return {name: problem for name, problem in probe_clips(names, 8, check).items() if problem is not None}


# --------------------------------------------------------------------------------------------------------------- output
def show_problems(what: str, problems: Sequence[tuple[str, str, str, str | None]]) -> None:
    """Warn of problems, if there are any: name, kind, reason and source of each."""
    if problems:
        lines = [f"{name}: {kind}: {why}" + (f" ({source})" if source else "") for name, kind, why, source in problems]
        say_problems(f"{len(problems)} {what}", [kind for _, kind, _, _ in problems], lines)


def show_next(script: str, *arguments: object) -> None:
    """Print the command that goes on from here, a script below examples/r1_aqa."""
    say(f"next:\n  {shell_command(script, *arguments)}")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Replace ``report.json`` in one piece."""
    write_atomically(folder / "report.json", json.dumps(report, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    :return: Exit status.
    """
    from aqa.evaluation.items import EvalError

    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments:
        arguments = ["--help"]
    try:
        args = parse_args(arguments)
        require("pyarrow", "soundfile", "tqdm")
        {"avqa": get_avqa, "mmau": get_mmau}[args.command](args)
    except (DataError, AvqaError, EvalError, ExtractError, UnpackError, OSError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        say(f"get_data.py: error: {explain(error) if isinstance(error, OSError) else error}")
        return 2
    except KeyboardInterrupt:
        say("get_data.py: interrupted; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
