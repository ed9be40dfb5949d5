"""Prepare AVQA for GRPO: R1-AQA's JSON lines, or the raw AVQA array, become LightRFT's parquet.

    python examples/r1_aqa/data_preprocess/avqa.py \\
        --input_jsonl data/AVQA/train_qa.data --audio_dir data/AVQA/audios --local_save_dir ~/data/avqa_lightrft
    python examples/r1_aqa/data_preprocess/avqa.py --input_jsonl mine/rows.jsonl --audio_dir mine \\
        --local_save_dir results/own/parquet --val_ratio 0.2 --split_by speaker
    python examples/r1_aqa/data_preprocess/avqa.py --input_jsonl mine/rows.jsonl --audio_dir mine \\
        --local_save_dir results/own/parquet --val_file mine/held_out.jsonl

Written are ``train.parquet``, with ``--val_ratio`` or ``--val_file`` also ``validation.parquet``, and ``report.json``:
what was read, what was left out and why, and what the audio is like. Files are replaced only once every new one is
complete.

Rows that cannot be used (malformed JSON, missing fields, an answer out of range, a control token of the model in the
text, ...) are left out. Rows whose audio is missing, unreadable or digital silence are kept, because training may find
it in order by then; both are reported. ``--skip_bad`` leaves the latter out too, ``--strict`` stops at either.
"""

import argparse
import gc
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the folder of the package aqa

from aqa.common.arguments import Parser
from aqa.common.console import say
from aqa.common.constants import PLAIN_LABEL, THINK_LABEL
from aqa.common.files import explain, unwritable
from aqa.common.model_type import missing_tokenizer
from aqa.data.parquet import build_table
from aqa.data.prepare_avqa import QUESTIONS_FILE, REPORT_FILE, TRAIN_FILE, VALIDATION_FILE, make_resolver, prepare
from aqa.data.prompts import render_prompt
from aqa.data.rows import ROW, AvqaError, split_by_clip

__all__ = ["AvqaError", "build_table", "main", "make_resolver", "render_prompt", "split_by_clip"]

ESSENTIAL = (
    *("--input_jsonl", "--audio_dir", "--local_save_dir", "--val_ratio", "--split_by", "--val_file", "--skip_bad"),
    *("--strict", "--pretrain", "--enable_think"),
)
EXIT_STATUS = (
    "exit status: 0 written; 2 nothing written: wrong use, wrong data or a file that cannot be read or written, the "
    "message says which;\n130 interrupted, nothing written; 1 a fault of this program, with its traceback"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags; paths become absolute.

    :raises AvqaError: naming every setting that cannot be used.
    """
    parser = Parser(
        prog="avqa.py",
        description=__doc__,
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        essential=ESSENTIAL,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, too")
    add_files(parser.add_argument_group("files"))
    add_prompt(parser.add_argument_group("prompt"))
    add_checks(parser.add_argument_group("checks"))
    args = parser.parse_args(argv)
    for name in ("input_jsonl", "audio_dir", "local_save_dir", *(["val_file"] if args.val_file else [])):
        setattr(args, name, os.path.abspath(getattr(args, name)))
    if args.pretrain and args.prompt_max_len is None:
        args.prompt_max_len = 512
    if problems := check_args(args):
        raise AvqaError("\n  ".join(["these settings cannot be used:", *problems]))
    return args


def add_files(files: argparse._ArgumentGroup) -> None:
    files.add_argument(
        "--input_jsonl",
        required=True,
        help="questions, told by their content: JSON lines or an array of R1-AQA, AVQA, AudioMCQ, DCASE 2026, MMSU or "
        "MMAU, the same as CSV or TSV with a header, parquet, or a folder of datasets.save_to_disk; sound inside the "
        "last two is written to --audio_dir",
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
    files.add_argument(
        "--split_by",
        metavar="FIELD",
        help="with --val_ratio or --val_file: a field of the rows, such as speaker or recording; rows with the same "
        "value are never in both parts",
    )
    files.add_argument(
        "--val_file",
        help="in place of --val_ratio: a second file of rows, all for validation; a clip that is in both files, also "
        "under two names, is refused",
    )
    files.add_argument("--seed", type=int, default=42, help="decides which clips are for validation (default: 42)")
    files.add_argument(
        "--answers_from",
        type=int,
        choices=(0, 1),
        help="the number of the first choice in the field answer (default: 0; a file that seems to count from 1 is "
        "refused until this says which it is)",
    )


def add_prompt(prompt: argparse._ArgumentGroup) -> None:
    prompt.add_argument(
        "--thinking_field",
        metavar="FIELD",
        help="with --enable_think: a field of the rows with a thinking process, kept as the column thinking, which "
        "train_colocate.py --sft_steps teaches",
    )
    prompt.add_argument(
        "--enable_think",
        action="store_true",
        help=f"ask for <think> </think> before the answer, and label the rows {THINK_LABEL} instead of {PLAIN_LABEL}",
    )
    prompt.add_argument(
        "--pretrain", help="model that will be trained: rows whose prompt is longer than --prompt_max_len are left out"
    )
    prompt.add_argument(
        "--prompt_max_len",
        type=int,
        help="longest prompt in tokens, a clip counted as one, as for train_colocate.py (default: 512 with --pretrain)",
    )


def add_checks(checks: argparse._ArgumentGroup) -> None:
    """Add the flags that say what is checked and what a bad row means."""
    checks.add_argument(
        "--no_check_audio",
        action="store_true",
        help="do not open the audio files, which takes some milliseconds for each: for sound that is not here, or that "
        "was checked before; training stops at files that are missing, damaged or silent",
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
        "--audio_seconds",
        type=float,
        default=30.0,
        help="longest clip that training will hear, as for train_colocate.py: a recording that is silent up to there "
        "is bad (default: 30)",
    )
    checks.add_argument(
        "--num_workers",
        type=int,
        default=min(32, 4 * (os.cpu_count() or 1)),
        help="how many audio files are probed at a time (default: %(default)s)",
    )
    either = checks.add_mutually_exclusive_group()
    either.add_argument("--skip_bad", action="store_true", help="also leave out rows without readable audio")
    either.add_argument(
        "--strict",
        action="store_true",
        help="write nothing if there is any unusable row, or missing or unreadable audio",
    )


def check_args(args: argparse.Namespace) -> list[str]:
    """One message for each setting that cannot be used, with value and remedy."""
    problems = []
    for flag, file in (("input_jsonl", args.input_jsonl), ("val_file", args.val_file)):
        if file is not None and not os.path.exists(file):
            problems.append(f"--{flag} {file}: no such file; it holds rows such as {ROW}")
    if os.path.exists(args.audio_dir) and not os.path.isdir(args.audio_dir):
        problems.append(f"--audio_dir {args.audio_dir}: not a folder; name the one that holds the .wav files")
    try:
        args.audio_dir.encode("utf-8")
    except UnicodeEncodeError:
        problems.append(f"--audio_dir {args.audio_dir!a}: not UTF-8, parquet cannot hold it; rename or link the folder")
    if problem := unwritable(Path(args.local_save_dir)):
        problems.append(f"--local_save_dir {args.local_save_dir}: {problem}")
    for name in (TRAIN_FILE, VALIDATION_FILE, QUESTIONS_FILE, REPORT_FILE):
        target = os.path.join(args.local_save_dir, name)
        if os.path.isdir(target):
            problems.append(f"--local_save_dir {args.local_save_dir}: {name} in it is a folder; move it away")
        elif os.path.exists(target) and any(
            file and os.path.exists(file) and os.path.samefile(target, file)
            for file in (args.input_jsonl, args.val_file)
        ):
            problems.append(f"--local_save_dir {args.local_save_dir}: {name} in it is the input; choose another folder")
    if not 0 <= args.val_ratio < 1:  # false for NaN as well
        problems.append(f"--val_ratio {args.val_ratio}: expected 0 <= ratio < 1, for example 0.02")
    if args.val_file and args.val_ratio:
        problems.append(f"--val_ratio {args.val_ratio} with --val_file: it is the whole validation part; drop one")
    if args.thinking_field and not args.enable_think:
        problems.append(f"--thinking_field {args.thinking_field}: the prompts would not ask for it; add --enable_think")
    if args.split_by and not args.val_ratio and not args.val_file:
        problems.append(f"--split_by {args.split_by}: nothing is split; add --val_ratio 0.2, or --val_file")
    if not 0.02 < args.audio_seconds < float("inf"):
        problems.append(f"--audio_seconds {args.audio_seconds:g}: must be above 0.02")
    if args.num_workers < 1:
        problems.append(f"--num_workers {args.num_workers}: expected at least 1")
    if args.pretrain:
        folder = Path(args.pretrain)
        if folder.is_dir():
            problems += [f"--pretrain {folder}: holds no {what}" for what in missing_tokenizer(folder)]
        elif folder.is_absolute() or args.pretrain.count("/") != 1:
            problems.append(f"--pretrain {folder}: no such folder")
    if args.prompt_max_len is not None and not args.pretrain:
        problems.append(f"--prompt_max_len {args.prompt_max_len}: the model counts the tokens; add --pretrain")
    if args.prompt_max_len is not None and args.prompt_max_len < 1:
        problems.append(f"--prompt_max_len {args.prompt_max_len}: expected at least 1")
    if args.skip_bad and args.no_check_audio:
        problems.append("--skip_bad with --no_check_audio: which audio is bad is not known without the check; drop one")
    if args.sandbox_audio and args.no_check_audio:
        problems.append("--sandbox_audio with --no_check_audio: no audio file is opened then; drop one")
    return problems


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    :return: Exit status: 0 written, 2 nothing written, 130 interrupted.
    """
    try:
        prepare(parse_args(argv))
    except (AvqaError, OSError) as error:
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        say(f"avqa.py: error: {explain(error) if isinstance(error, OSError) else error}")
        return 2
    except KeyboardInterrupt:
        say("avqa.py: interrupted, nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    gc.disable()  # a short process whose many objects form no cycles: looking for some costs a tenth of its time
    sys.exit(main())
