#!/usr/bin/env python3
"""Measure which rows of prepared data are worth training on: how often a model answers each one right.

    python examples/r1_aqa/select_data.py --model_path MODEL --data_file results/demo/parquet \\
        --out_dir results/demo/rated --engine vllm
    python examples/r1_aqa/train_colocate.py --prompt_data results/demo/rated \\
        --max_silent_pass_rate 0.5 --pass_rate 0.1 0.9 ...

Each row is asked --samples times with its sound and as often in silence, as in training: sampled, at temperature 1.
OUT_DIR/train.parquet has the same rows in the same order, and two more columns, pass_rate and pass_rate_silent, which
training ignores unless its flags ask for them. The same command continues after Ctrl-C or a kill.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aqa.common.arguments import Parser, shell_command
from aqa.common.console import several
from aqa.common.files import unwritable, write_files
from aqa.common.lock import lock
from aqa.data.prepare_avqa import REPORT_FILE
from aqa.data.selection import PASS_RATE, SILENT_PASS_RATE
from aqa.evaluation import asking, pass_rates
from aqa.evaluation.checkpoints import Model, resolve_model
from aqa.evaluation.items import EvalError, PartialFile, digest
from aqa.training.flags import REWARDS

TRAIN = "train.parquet"
BESIDE = ("validation.parquet", "validation.json", REPORT_FILE)  # so that the folder can take the place of avqa.py's
ESSENTIAL = ("--model_path", "--data_file", "--out_dir", "--engine", "--samples", "--max_new_tokens", "--overwrite")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags; the EvalError names every setting that cannot be used."""
    kind = {"epilog": asking.EXIT_STATUS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(prog="select_data.py", description=__doc__, essential=ESSENTIAL, **kind)
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, too")
    asking.add_model_flags(parser.add_argument_group("model"))
    g = parser.add_argument_group("data")
    g.add_argument(
        "--data_file", type=Path, required=True, help=f"parquet file that avqa.py wrote, or its folder ({TRAIN})"
    )
    g.add_argument(
        "--out_dir",
        type=Path,
        required=True,
        help=f"folder for {TRAIN} with the rates; a folder's validation part and report are copied into it",
    )
    g.add_argument("--overwrite", action=flag, default=False, help="replace an earlier run's files, finished or not")
    asking.add_untrusted_flag(g)
    g = parser.add_argument_group("rates")
    g.add_argument("--samples", type=int, default=8, help="responses a row and kind of sound (default: 8)")
    g.add_argument(
        "--silent_audio", action=flag, default=True, help="ask in silence, too, which takes as long again (default: on)"
    )
    g.add_argument("--temperature", type=float, default=1.0, help="as for training (default: 1)")
    g.add_argument("--reward", choices=REWARDS, default="r1_aqa", help="whose accuracy counts (default: r1_aqa)")
    asking.add_generation_flags(
        parser.add_argument_group("generation"), "of what is drawn; after an interruption the rest is drawn anew"
    )
    args = parser.parse_args(argv)
    if args.data_file.is_dir():
        args.data_file /= TRAIN
    if problems := find_problems(args):
        raise EvalError(several("these settings cannot be used", problems))
    return args


def find_problems(args: argparse.Namespace) -> list[str]:
    """Check the flags; return one message per problem."""
    problems = asking.find_engine_problems(args, "samples")
    unfinished = (args.out_dir / "select.partial.jsonl").exists()  # perhaps begun with --overwrite
    held = ", ".join(name for name in (TRAIN, *BESIDE) if (args.out_dir / name).exists() and not unfinished)
    if not 0 < args.temperature <= 2:
        problems.append(f"--temperature {args.temperature}: must be above 0 and at most 2 (vLLM's limit)")
    if not args.data_file.is_file():
        problems.append(f"--data_file {args.data_file}: no such file")
    elif args.out_dir.exists() and args.out_dir.samefile(args.data_file.parent):
        problems.append(f"--out_dir {args.out_dir}: is the folder of --data_file; name another")
    elif problem := unwritable(args.out_dir):
        problems.append(f"--out_dir {args.out_dir}: {problem}")
    elif held and not args.overwrite:
        problems.append(f"--out_dir {args.out_dir}: holds {held}; --overwrite replaces all of that")
    return problems


def select(args: argparse.Namespace) -> None:
    """Check everything, ask, and write the rates.

    :raises EvalError: for anything that the user can correct; before the model is loaded, except for its own faults.
    """
    model = resolve_model(args.model_path, args.base_model, args.lora_scale)
    asking.check_adapter(model)
    table = pass_rates.read_table(args.data_file)
    items = pass_rates.make_items(table, args.data_file)
    ways = 2 if args.silent_audio else 1
    print(f"{len(items):,} rows of {args.data_file}, {args.samples} responses each" + ", and in silence" * (ways == 2))
    print(f"model  {args.model_path}" + (f"\n       {model.note}" if model.note else ""))
    args.out_dir.mkdir(parents=True, exist_ok=True)
    place = args.out_dir / "select"
    with lock(place.with_suffix(".lock"), f"--out_dir {args.out_dir}"):
        partial_file = PartialFile(place.with_suffix(".partial.jsonl"), identity(args, model))
        if args.overwrite:
            partial_file.remove()
        done = partial_file.load()
        wanted = [*range(len(items)), *(range(-1, -1 - len(items), -1) if args.silent_audio else ())]
        if any(index not in done for index in wanted):
            asking.check_device(args)
            reader = asking.make_reader(args, model)
            lengths, bad, silent = asking.check_audio(items, reader)
            pass_rates.refuse_audio(bad, silent, items)
            if done:
                print(f"continuing: {len(done):,} of {len(wanted):,} were finished before")
            own = {"items": items, "lengths": lengths, "in_silence": args.silent_audio, "reader": reader}
            jobs, log = partial(pass_rates.make_jobs, **own), place.with_suffix(".log")
            asking.ask(args, model, jobs, done, partial_file, log, args.samples, args.temperature)
        write(args, model, table, items, done)
        partial_file.remove()


def write(args: argparse.Namespace, model: Model, table: Any, items: Sequence[Any], done: dict[int, Any]) -> None:
    """Score the responses, write the parquet file, and say what it holds."""
    import pyarrow.parquet as pq

    print("scoring ...")
    kinds = {PASS_RATE: lambda i: i} | ({SILENT_PASS_RATE: lambda i: -1 - i} if args.silent_audio else {})
    said = {name: [done[number(item.index)] for item in items] for name, number in kinds.items()}
    rates = {name: pass_rates.score(items, responses, args.reward) for name, responses in said.items()}
    rated = pass_rates.with_rates(table, rates, asking.describe_run(args, model))
    writers = {TRAIN: partial(pq.write_table, rated)}
    for name in BESIDE if args.data_file.name == TRAIN else ():
        if (source := args.data_file.with_name(name)).is_file():
            writers[name] = lambda file, source=source: file.write(source.read_bytes())
    write_files(args.out_dir, f"--out_dir {args.out_dir}", writers, obsolete=(TRAIN, *BESIDE[:2]))
    print(f"\n{pass_rates.describe(rates, args.samples)}\n\nrates    {args.out_dir / TRAIN}")
    if model.adapter:  # training starts from a whole model, whose rates these are not
        return
    choice = ("--max_silent_pass_rate", 0.5) if args.silent_audio else ("--pass_rate", 0.1, 0.9)
    places = ("--pretrain", model.path, "--prompt_data", args.out_dir, "--save_path", f"{args.out_dir}_run")
    asked = ("--temperature", args.temperature, "--generate_max_len", args.max_new_tokens, "--reward", args.reward)
    seconds = () if args.audio_seconds == 30 else ("--audio_seconds", args.audio_seconds)
    print(f"next      {shell_command('train_colocate.py', *places, *choice, *asked, *seconds)}")


def identity(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Everything a response depends on."""
    names = ("engine", "dtype", "max_new_tokens", "samples", "temperature", "audio_seconds")
    return {"data_sha256": digest(args.data_file), "model": model.identity()} | {n: getattr(args, n) for n in names}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    return asking.run_command(lambda: select(parse_args(argv)), debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
