#!/usr/bin/env python3
"""Evaluate a model on MMAU, MMAR, MMSU, ADQA or MMAU-Pro; the scores equal those of the official scripts.

    python examples/r1_aqa/eval_mmau.py [run] --model_path RUN --data_file mmau-test-mini.json --audio_dir mmau \\
        --out_file results/mmau.json --engine vllm
    python examples/r1_aqa/eval_mmau.py score results/mmau.json
    python examples/r1_aqa/eval_mmau.py compare results/before.json results/after.json

It writes the result file, which the official scripts can read, the scores (OUT.score.json) and the libraries' log
(OUT.log). The same command continues a run that was interrupted or killed: finished answers are kept in
OUT.partial.jsonl until the result file is complete.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aqa.common.arguments import Parser
from aqa.common.console import several
from aqa.common.files import unwritable, write_atomically
from aqa.common.lock import lock
from aqa.data.rows import show_value
from aqa.evaluation import asking
from aqa.evaluation.answers import Answer, extract_answer
from aqa.evaluation.benchmarks import BENCHMARKS, Benchmark
from aqa.evaluation.checkpoints import Model, asked_to_think, resolve_model
from aqa.evaluation.items import (
    EvalError,
    Item,
    PartialFile,
    digest,
    make_items,
    names_choice,
    read_rows,
    result_rows,
    write_rows,
)
from aqa.evaluation.scoring import compare, comparison_table, judge, judge_file, percent, score, score_table, to_json
from aqa.evaluation.variants import ask_again, further_answers, own_index

SHOWN_ANSWERS = 10  # to questions without an answer to compare them with

ESSENTIAL = (
    *("--model_path", "--data_file", "--audio_dir", "--out_file", "--overwrite", "--engine", "--max_new_tokens"),
    *("--limit", "--silent_audio", "--think"),
)


# ---------------------------------------------------------------------------------------------------------------- flags
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags of ``run``; the EvalError names every setting that cannot be used."""
    kind = {"epilog": asking.EXIT_STATUS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(prog="eval_mmau.py", description=__doc__, essential=ESSENTIAL, **kind)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, too")
    asking.add_model_flags(parser.add_argument_group("model"))
    add_question_flags(parser)
    add_answer_flags(parser)
    args = parser.parse_args(argv)
    problems = find_problems(args)
    if problems:
        raise EvalError(several("these settings cannot be used", problems))
    return args


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    flag = argparse.BooleanOptionalAction
    g = parser.add_argument_group("benchmark")
    g.add_argument("--data_file", required=True, help="questions of a benchmark, or rows as avqa.py reads them")
    g.add_argument(
        "--audio_dir",
        required=True,
        help="folder of the recordings; of a path that does not exist the longest end that is in it counts",
    )
    g.add_argument(
        "--benchmark", choices=["auto", *BENCHMARKS], default="auto", help="auto: by the fields (default: auto)"
    )
    g.add_argument("--limit", type=int, help="ask only this many questions, the first ones (default: all)")
    g.add_argument(
        "--think",
        action=flag,
        help="ask for the thinking process before the answer (default: only if all of the model's training rows did)",
    )
    g.add_argument(
        "--silent_audio",
        nargs="?",
        choices=["no", "only", "also"],
        default="no",
        const="only",
        help="replace every clip by silence of the same length, to see what the model knows without listening. only "
        "(the default where no value is given): an ablation, and all output says so; also: ask each question with "
        "sound and in silence, which becomes a column of the table",
    )
    g.add_argument(
        "--option_orders",
        type=int,
        default=1,
        help="ask each question with its options in this many orders, each beginning with another option, and report "
        "how much the accuracy depends on it; the score is that of the file's own order (default: 1)",
    )
    g.add_argument(
        "--skip_bad_audio",
        action=flag,
        default=False,
        help="do not ask items whose audio is missing or broken, and count them as wrong, instead of stopping before "
        "the first question",
    )
    g = parser.add_argument_group("untrusted benchmarks")
    g.add_argument(
        "--confine_audio",
        action=flag,
        default=False,
        help="refuse recordings outside --audio_dir, whether by an absolute path, by .. or by a link",
    )
    asking.add_untrusted_flag(g)


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the result file and of how answers are generated."""
    flag = argparse.BooleanOptionalAction
    g = parser.add_argument_group("output")
    g.add_argument("--out_file", required=True, help="result file: .json, .jsonl for MMSU, .parquet for MMAU-Pro")
    g.add_argument(
        "--overwrite", action=flag, default=False, help="replace results, finished or not, of an earlier run"
    )
    g = parser.add_argument_group("generation (greedy)")
    asking.add_generation_flags(g, "seed of the libraries; greedy decoding draws nothing")


def find_problems(args: argparse.Namespace) -> list[str]:
    """Check the flags; return one message per problem."""
    problems = asking.find_engine_problems(args, "limit", "option_orders")
    if not Path(args.audio_dir).is_dir():
        problems.append(f"--audio_dir {args.audio_dir}: is no folder")
    out = Path(args.out_file)
    if out.suffix not in (".json", ".jsonl", ".parquet"):
        problems.append(
            f"--out_file {out}: must end in .json, .jsonl or .parquet, from which the official scripts tell the format"
        )
    if problem := unwritable(out.parent):
        problems.append(f"--out_file {out}: {problem}")
    elif folders := [path.name for path in files_of(out) if path.is_dir()]:
        problems.append(f"--out_file {out}: {', '.join(folders)} beside it would be written and is a folder")
    elif out.exists() and Path(args.data_file).exists() and out.samefile(args.data_file):
        problems.append(f"--out_file {out}: is the --data_file")
    elif is_finished(out) and not args.overwrite:
        problems.append(f"--out_file {out}: exists; --overwrite replaces it")
    return problems


def is_finished(out: Path) -> bool:
    """Whether a result is there that no unfinished run, begun with ``--overwrite``, is to replace."""
    return out.exists() and not out.with_suffix(".partial.jsonl").exists()


def files_of(out: Path) -> list[Path]:
    """What an evaluation writes: the results, and beside them scores, unfinished responses, lock and log."""
    return [out, *(out.with_suffix(end) for end in (".score.json", ".partial.jsonl", ".lock", ".log"))]


# ----------------------------------------------------------------------------------------------------------- evaluation
def evaluate(args: argparse.Namespace) -> None:
    """Check everything, ask the questions, write and score the answers.

    :raises EvalError: for anything that the user can correct; before the model is loaded, except for its own faults.
    """
    out = Path(args.out_file)
    benchmark, rows = read_rows(Path(args.data_file), args.benchmark, Path(args.audio_dir))
    if out.suffix not in benchmark.suffixes:
        ends = " or ".join(benchmark.suffixes)
        raise EvalError(f"--out_file {out}: must end in {ends}, the only format that {benchmark.title}'s script reads")
    model = resolve_model(args.model_path, args.base_model, args.lora_scale)
    asking.check_adapter(model)
    trained_to_think = asked_to_think(model)
    if args.think is None:
        args.think = trained_to_think == 1
    items = make_items(rows, benchmark, Path(args.audio_dir), args.think, args.confine_audio, args.limit)
    again = ask_again(items, args.option_orders, args.silent_audio == "also", args.think, len(rows))
    announce(args, items, model, trained_to_think)
    announce_answers(rows, items)

    out.parent.mkdir(parents=True, exist_ok=True)
    with lock(out.with_suffix(".lock"), f"--out_file {out}"):
        ask_and_score(args, benchmark, items, again, len(rows), model, trained_to_think)


def ask_and_score(
    args: argparse.Namespace,
    benchmark: Benchmark,
    items: Sequence[Item],
    again: Sequence[Item],
    stride: int,
    model: Model,
    trained_to_think: float | None,
) -> None:
    """Ask the questions, write and score the answers; the files beside ``--out_file`` are this process's alone.

    :param again: The same questions, asked in other ways; see :func:`ask_again`, also for ``stride``.
    :param trained_to_think: Share of the model's training rows that asked for the thinking process; None: unknown.
    :raises EvalError: for what the user can correct.
    """
    out = Path(args.out_file)
    if is_finished(out) and not args.overwrite:
        raise EvalError(f"--out_file {out}: another evaluation has just written it; --overwrite replaces it")
    partial = PartialFile(out.with_suffix(".partial.jsonl"), identity(args, benchmark, model))
    if args.overwrite:
        partial.remove()
    done = partial.load()
    reader = asking.make_reader(args, model)
    if len(done) < len(items) + len(again):
        asking.check_device(args)
    lengths, bad, silent = asking.check_audio(items, reader, benchmark.is_whole)
    report_audio(items, bad, silent, skip_bad=args.skip_bad_audio)
    lengths |= {item.index: lengths[own] for item in again if (own := own_index(item.index, stride)) in lengths}
    done = {index: raw for index, raw in done.items() if index in lengths}
    if done:
        print(f"continuing: {len(done)} answers were finished before")

    timing: dict[str, Any] = {"seconds": 0.0, "asked": 0}
    if len(done) < len(lengths):
        asked = [item for item in (*items, *again) if item.index in lengths]
        timing = ask_items(args, model, asked, lengths, reader, done, partial)
    responses = [done.get(item.index, "") for item in items]
    answers = [extract_answer(raw, item.row["choices"]) for item, raw in zip(items, responses, strict=True)]
    pairs = ((answer.text, raw) for answer, raw in zip(answers, responses, strict=True))
    results = result_rows(items, pairs, benchmark, args.silent_audio == "only")
    ways = (args.option_orders, args.silent_audio == "also", stride)
    results = [row | further_answers(item, done, *ways) for row, item in zip(results, items, strict=True)]
    counts, scores = describe_answers(answers, responses, args.think), None
    if items[0].gold is not None:
        scores = score(judge(results, benchmark)) | counts
        scores["bad_audio"] = [items[i].row.get("id") for i in bad]
        if heard := len(items) - len(bad):
            scores["of_asked"] = {"accuracy": scores["correct"] / heard, "correct": scores["correct"], "total": heard}
        scores["digital_silence"] = [items[i].row.get("id") for i in silent]
        scores["run"] = asking.describe_run(args, model) | timing | {"trained_to_think": trained_to_think}
        write_atomically(out.with_suffix(".score.json"), to_json(scores))
    write_rows([benchmark.without_copies(row) for row in results], out)
    partial.remove()
    show_result(out, benchmark, scores, results, counts, len(bad))


def ask_items(
    args: argparse.Namespace,
    model: Model,
    items: Sequence[Item],
    lengths: dict[int, list[int]],
    reader: Any,
    done: dict[int, str],
    partial: PartialFile,
) -> dict[str, Any]:
    """Ask the items that have no response yet; responses are added to ``done`` and to ``partial``.

    :param lengths: Samples of each item's clips, by its index.
    :return: Seconds, and how many were asked.
    """
    from aqa.evaluation.engines import Job, render

    mute = args.silent_audio == "only"

    def make_jobs(processor: Any) -> list[Job]:
        texts = [render(processor, item.prompt, 1 + len(item.further)) for item in items]
        return [
            Job(item.index, text, [item.audio, *item.further], lengths[item.index], item.silent or mute, reader)
            for item, text in zip(items, texts, strict=True)
        ]

    golds = list(dict.fromkeys(item.gold for item in items if item.gold and item.row.get("choices")))
    return asking.ask(args, model, make_jobs, done, partial, Path(args.out_file).with_suffix(".log"), golds=golds)


def announce(args: argparse.Namespace, items: Sequence[Item], model: Model, trained_to_think: float | None) -> None:
    """Print the questions and the model, with a warning if the model was trained to answer in another form.

    :param trained_to_think: Share of the model's training rows that asked for the thinking process; None: unknown.
    """
    print(f"{len(items)} questions of {args.data_file}")
    print(f"model  {args.model_path}" + (f"\n       {model.note}" if model.note else ""))
    if args.think:
        print("the prompts ask for the thinking process before the answer")
    if trained_to_think == 1 - args.think:
        habit = "to think before it answers" if trained_to_think else "to answer at once"
        print(f"WARNING: the model was trained {habit}, and is asked otherwise", file=sys.stderr)
    if args.silent_audio == "only":
        print("ABLATION: silence of the same length in place of every clip")


def announce_answers(rows: Sequence[dict[str, Any]], items: Sequence[Item]) -> None:
    """Print how the file's answers are read, with a warning of those that no prediction can match."""
    if items[0].gold is None:
        held = show_value(rows[0].get("answer"))
        print(f"the file holds no answers (the first is {held}), so nothing will be scored")
        return
    read = [(row["answer"], item.gold) for row, item in zip(rows, items, strict=False) if row["answer"] != item.gold]
    if read:
        said, gold = map(show_value, read[0])
        print(f"answers that are numbers or letters of choices are read as their texts: {len(read)}; {said} is {gold}")
    odd = [
        f"{item.label}: {show_value(item.gold)}" for item in items if not names_choice(item.gold, item.row["choices"])
    ]
    if odd:
        title = f"WARNING: the answers of {len(odd)} of {len(items)} items are no choice, so no prediction can be right"
        print(several(title, odd), file=sys.stderr)


def report_audio(items: Sequence[Item], bad: dict[int, str], silent: Sequence[int], skip_bad: bool) -> None:
    """Print which recordings are unusable or silent.

    :param bad: Error messages of the unusable ones, by item index.
    :param silent: Indices of items whose recording is digital silence.
    :raises EvalError: if a recording is unusable, unless ``skip_bad``.
    """
    if bad:
        message = several(f"the audio of {len(bad)} of {len(items)} items cannot be used", list(bad.values()))
        scored = items[0].gold is not None
        if not skip_bad:
            raise EvalError(f"{message}\n--skip_bad_audio {'counts such items as wrong' if scored else 'skips them'}.")
        print(f"{message}\n{'counted as wrong' if scored else 'not asked'}", file=sys.stderr)
    if silent:
        title = f"WARNING: {len(silent)} of {len(items)} items are digital silence; they are asked like all others"
        named = [f"{items[i].label}: {', '.join(map(str, (items[i].audio, *items[i].further)))}" for i in silent]
        print(several(title, named), file=sys.stderr)


def title_of(benchmark: Benchmark, scores: dict[str, Any]) -> str:
    """What a table of scores is headed with. Rows of one's own have MMAU's format, but no difficulty."""
    own = benchmark.name == "mmau" and "difficulty" not in scores["by"]
    return "own questions, by the rule of MMAU's script" if own else f"{benchmark.title}: {benchmark.rule}"


def show_result(
    out: Path,
    benchmark: Benchmark,
    scores: dict[str, Any] | None,
    results: Sequence[dict[str, Any]],
    counts: dict[str, int],
    bad: int,
) -> None:
    """Print the table of scores, or the first answers where there are none to compare them with, and where the files
    are.

    :param counts: What :func:`describe_answers` says.
    :param bad: Items that were not asked, because of their recordings.
    """
    named = f"answers that name one choice: {counts['names_a_choice']}, in the asked-for form: {counts['asked_form']}"
    print()
    if scores is None:
        for row in results[:SHOWN_ANSWERS]:
            names = benchmark.audio_key, "question", benchmark.prediction_keys[0]
            print("  ".join(show_value(row[name]) for name in names))
        print(f"\n{named}, of {len(results) - bad}" + f"\nnot asked because of their recordings: {bad}" * (bad > 0))
        print(f"results  {out}: all answers")
        return
    print(score_table(scores, title_of(benchmark, scores)))
    print(f"\n{named}, of {scores['total']}")
    if bad:
        asked = scores.get("of_asked")
        of_asked = f"; of the {asked['total']} that were asked {percent(asked['accuracy'])} are right" if asked else ""
        print(f"not asked, and counted as wrong, because of their recordings: {bad}{of_asked}")
    print(f"results  {out}\nscores   {out.with_suffix('.score.json')}")


def identity(args: argparse.Namespace, benchmark: Benchmark, model: Model) -> dict[str, Any]:
    """Everything a response depends on; an interrupted run may change its batch size and limit before it continues."""
    return {
        "benchmark": benchmark.name,
        "data_sha256": digest(Path(args.data_file)),
        "audio_dir": str(Path(args.audio_dir).resolve()),
        "model": model.identity(),
        "engine": args.engine,
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
        "think": args.think,
        "silent_audio": args.silent_audio == "only",
        **({} if args.audio_seconds == 30 else {"audio_seconds": args.audio_seconds}),  # older files lack it
    }


def describe_answers(answers: Sequence[Answer], responses: Sequence[str], think: bool) -> dict[str, int]:
    """Count the responses that name a choice, have answer tags, and have the form that was asked for."""
    from aqa.rewards.r1_aqa import format_reward_fn

    return {
        "names_a_choice": sum(answer.is_choice for answer in answers),
        "tagged": sum(answer.tagged for answer in answers),
        "asked_form": sum(int(format_reward_fn(raw, think)) for raw in responses),
    }


# ------------------------------------------------------------------------------------------------------- other commands
def score_file(argv: Sequence[str]) -> None:
    """The ``score`` command: print the table of a result file, ours or another program's."""
    parser = Parser(
        prog="eval_mmau.py score", description="Score a result file by the official rule.", epilog=asking.EXIT_STATUS
    )
    parser.add_argument("file", type=Path, help="result file of a benchmark")
    parser.add_argument("--benchmark", choices=["auto", *BENCHMARKS], default="auto", help="auto: by the fields")
    parser.add_argument("--out_file", type=Path, help="write the scores here too, as JSON")
    args = parser.parse_args(argv)
    verdicts = judge_file(args.file, args.benchmark)
    scores = score(verdicts)
    print(score_table(scores, f"{title_of(verdicts.benchmark, scores)}: {args.file} ({verdicts.key})"))
    write_beside(args.out_file, to_json(scores), [args.file])


def compare_files(argv: Sequence[str]) -> None:
    """The ``compare`` command: print a paired table for the first result file and each of the others."""
    parser = Parser(
        prog="eval_mmau.py compare",
        description="Compare result files item by item, every other one with the first: accuracies by task, their "
        "difference with a 95 %% interval (in points), the items that only one got right, and McNemar's exact p-value.",
        epilog=asking.EXIT_STATUS,
    )
    parser.add_argument("first", type=Path, help="result file to compare with, such as that of the start model")
    parser.add_argument("others", type=Path, nargs="+", help="result files of the same questions")
    parser.add_argument("--benchmark", choices=["auto", *BENCHMARKS], default="auto", help="auto: by the fields")
    parser.add_argument("--out_file", type=Path, help="write the comparisons here too, as JSON")
    args = parser.parse_args(argv)
    first = judge_file(args.first, args.benchmark)
    comparisons = {}
    for other in args.others:
        second = judge_file(other, args.benchmark)
        try:
            comparisons[str(other)] = compare(first, second)
        except EvalError as error:
            raise EvalError(f"{args.first} and {other}: {error}") from error
        names = tuple(
            f"{path}{' (silence in place of every clip)' if any(r.get('silent_audio') for r in v.rows) else ''}"
            for path, v in ((args.first, first), (other, second))
        )
        print(comparison_table(comparisons[str(other)], names), end="\n\n" if other != args.others[-1] else "\n")
    write_beside(args.out_file, to_json({"first": str(args.first), "second": comparisons}), [args.first, *args.others])


def write_beside(out: Path | None, text: str, results: Sequence[Path]) -> None:
    """Write what was computed of result files, if a file is named for it.

    :raises EvalError: if that is one of the result files.
    """
    if out is None:
        return
    if out.exists() and any(out.samefile(result) for result in results):
        raise EvalError(f"--out_file {out}: is a result file itself; name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, ``run`` by default, and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv.pop(0) if argv and argv[0] in ("run", "score", "compare") else "run"
    rest = [arg for arg in argv if arg != "--debug"]
    actions = {
        "run": lambda: evaluate(parse_args(argv)),
        "score": lambda: score_file(rest),
        "compare": lambda: compare_files(rest),
    }
    return asking.run_command(actions[command], debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
