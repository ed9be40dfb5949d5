"""What a run ends with on the terminal: its metrics at the first and the last step, what it learned, what is next."""

import argparse
import glob
import json
import re
import textwrap
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from aqa.common.arguments import shell_command
from aqa.data.prepare_avqa import QUESTIONS_FILE, REPORT_FILE
from aqa.evaluation.scoring import SURE, WHAT_P_IS, paired
from aqa.training.flags import has_split

EVALUATION_FOLDER = "eval/rows"  # a file for each evaluation, with a record for each answer
RESULT_ENDS = (".json", ".partial.jsonl")  # of a finished evaluation and of an unfinished one
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
    "health/anomalies": "warnings in all steps, of which the first of each kind was printed",
    "health/skipped_steps": "optimizer steps left out",
    "health/failed_saves": "checkpoints that could not be written",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON Lines, such as ``metrics.jsonl``, in the order of the steps.

    :param path: The result is empty if there is no such file. A last line that was cut off is left out.
    """
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def summary(args: argparse.Namespace) -> str:
    """The table, what was learned, and where model and metrics are.

    :param args: The run's flags.
    """
    path = Path(args.save_path) / "metrics.jsonl"
    learned = f"learned   {lesson(Path(args.save_path), vars(args))}"
    return "\n".join(
        (
            "",
            *summary_table(read_metrics(path)),
            *([textwrap.fill(learned, 80, subsequent_indent=" " * 10)] if args.report else ()),
            f"model     {args.save_path}",
            f"metrics   {path}",
        )
    )


def lesson(run: Path, flags: Mapping[str, Any]) -> str:
    """A sentence about the answers to the evaluation data: before training, after it, and without sound.

    :param flags: Of the run; an older one may lack some.
    """
    records = read_metrics(run / "metrics.jsonl")
    files = sorted((run / EVALUATION_FOLDER).glob("step_*.jsonl"))
    steps = [int(file.stem.removeprefix("step_")) for file in files]
    if records:  # a run that was resumed to end earlier leaves files of later steps
        files = [file for file, step in zip(files, steps, strict=True) if step <= records[-1]["step"]]
    if not files and flags.get("eval_benchmark"):
        return f"the answers to {flags['eval_benchmark']} are in {run / 'eval'}; compare a file's first with its last"
    if not files and any(is_accuracy(name) for record in records for name in record):
        return "see the evaluation's accuracies; their answers, which a test needs, were not kept"
    if not files:
        sources = (flags.get("eval_data") or flags.get("prompt_data") or "none").split(",")
        there = flags.get("eval_data") or all(has_split(source, flags.get("eval_split", "")) for source in sources)
        held_out = "" if there else ", and hold rows out by avqa.py --val_ratio 0.2"
        return f"not measured on held-out data: add --eval_steps 100{held_out}"
    first, last = read_verdicts(files[0]), read_verdicts(files[-1])
    if not first[False].keys() & last[False].keys():
        return f"the first and the last evaluation, {files[0]} and {files[-1]}, asked different questions"
    when = ("after the warm start" if flags.get("sft_steps") else "before") if steps[0] == 0 else f"at step {steps[0]}"
    told = against(first[False], last[False])
    (before, after), questions = told["accuracy"], f"{told['total']} questions"
    verdict = "too little for a difference"
    if told["mcnemar_p"] < SURE:
        verdict = "it has learned" if told["difference"] > 0 else "it has become worse"
    sentence = f"held-out accuracy {before:.3f} {when}, {after:.3f} after step {steps[len(files) - 1]}"
    sentence += f" ({questions}, p={told['mcnemar_p']:.1g}): {verdict}"
    if len(files) == 1:
        sentence = f"held-out accuracy {after:.3f} after step {steps[0]} ({questions}), not measured before"
    if last[True]:
        told = against(last[True], last[False])
        sign = "it listens" if told["mcnemar_p"] < SURE and told["difference"] > 0 else "no sign that it listens"
        sentence += f"; in silence {told['accuracy'][0]:.3f} (p={told['mcnemar_p']:.1g}): {sign}"
    else:
        sentence += "; --eval_silent would tell whether it listens"
    return sentence + (f". {WHAT_P_IS}" if "p=" in sentence else "")


def read_verdicts(file: Path) -> dict[bool, dict[tuple, bool]]:
    """Which questions of an evaluation were answered rightly, with sound (False) and in silence (True)."""
    found: dict[bool, dict[tuple, bool]] = {False: {}, True: {}}
    for record in read_metrics(file):
        found[record["silent"]][row_key(record)] = record.get("accuracy_reward", record["reward"]) > 0
    return found


def row_key(record: dict[str, Any]) -> tuple:
    """What tells a record's question apart: its row, and all of it, since a resumed run may have other data."""
    return (record["row"], record["prompt"], record["reference"])


def against(first: dict[tuple, bool], second: dict[tuple, bool]) -> dict[str, Any]:
    """Both compared on the questions that both have, by McNemar's exact test."""
    shared = [key for key in first if key in second]
    return paired([first[key] for key in shared], [second[key] for key in shared])


def next_command(args: argparse.Namespace) -> str | None:
    """The command that evaluates the model on all held-out questions, into a new file; else the one that compares the
    answers to ``--eval_benchmark`` before and after; None where there are neither."""
    data = held_out_files(args)
    if data is None and args.eval_benchmark:
        name = glob.escape(Path(args.eval_benchmark.split(",")[0].strip()).stem)
        found = sorted(Path(args.save_path, "eval").glob(f"{name}_step_*"))
        files = [file for file in found if file.suffix in (".json", ".jsonl")]  # not what a killed run left of one
        return shell_command("eval_mmau.py", "compare", files[0], files[-1]) if len(files) > 1 else None
    if data is None:
        return None
    stem = f"{args.save_path.rstrip('/')}_result"
    names = chain([stem], (f"{stem}_{number}" for number in count(2)))
    result = next(name for name in names if not any(Path(f"{name}{end}").exists() for end in RESULT_ENDS))
    flags = {"--model_path": args.save_path, "--data_file": data[0], "--audio_dir": data[1]}
    flags |= {"--out_file": f"{result}.json", "--max_new_tokens": args.generate_max_len}
    if args.audio_seconds != 30:
        flags["--audio_seconds"] = args.audio_seconds
    return shell_command("eval_mmau.py", *chain(*flags.items()))


def held_out_files(args: argparse.Namespace) -> tuple[Path, Path] | None:
    """Held-out questions that ``avqa.py`` has written for ``eval_mmau.py``, and the folder of their recordings.

    Where that is not known, it is the questions' own: the rows name recordings by their whole path.
    """
    source = Path((args.eval_data or args.prompt_data).split(",")[0].strip())
    files = [source] if args.eval_data else []
    if source.is_dir():
        files = [source / f"{args.eval_split}{end}" for end in (".json", ".parquet")]
    for file in files:
        try:
            report = json.loads(file.with_name(REPORT_FILE).read_text(encoding="utf-8"))
            sounds = Path(report["settings"]["audio_dir"])
        except (OSError, ValueError, KeyError, TypeError):  # none is there, or another program's
            sounds = file.parent
        if file.is_file() and (file.name == QUESTIONS_FILE or sounds != file.parent):
            return file, sounds if sounds.is_dir() else file.parent
    return None


def summary_table(records: list[dict[str, Any]]) -> list[str]:
    """First and last step, mean of the last ones, first and last evaluation, and counts of what went wrong.

    :param records: One a step, and step 0 for the evaluation before them; a value is None where the step has no such
        number.
    """
    measured, records = records, [record for record in records if record["step"] > 0]
    if not records:
        return []
    last = f"step {records[-1]['step']}"
    lines = [f"{'':18}{'step ' + str(records[0]['step']):>12}{last:>12}{f'mean of {min(RECENT, len(records))}':>12}"]
    for label, name, form in ROWS:
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            recent = [r[name] for r in records[-RECENT:] if r.get(name) is not None] or values[-1:]
            cells = (values[0], values[-1], sum(recent) / len(recent))
            lines.append(f"{label:18}" + "".join(f"{format(value, form):>12}" for value in cells))
    names = {name for record in measured for name in record if is_accuracy(name)}
    for name in sorted(names):
        found = [record for record in measured if record.get(name) is not None]
        if found:
            ends = [f"{record[name]:.3f} at step {record['step']}" for record in (found[0], found[-1])]
            heard = re.sub("_silent(?=/|$)", "", name)  # a file's own name may end so
            in_silence = " in silence" if heard != name and heard in names else ""
            label = (heard if in_silence else name).split("/")[1].replace("accuracy_reward", "held-out accuracy")
            label += in_silence
            lines.append(f"{label:18} {' to '.join(dict.fromkeys(ends))}")
    lines += [f"{int(records[-1][name])} {what}" for name, what in COUNTS.items() if records[-1].get(name)]
    return lines


def is_accuracy(name: str) -> bool:
    """Whether a metric is the accuracy of an evaluation."""
    return name.startswith("eval/") and name.endswith(("/accuracy_reward", "/accuracy_reward_silent", "/accuracy"))
