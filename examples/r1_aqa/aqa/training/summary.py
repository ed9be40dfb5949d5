"""What a run ends with on the terminal: its metrics at the first and the last step, what it learned, what is next."""

import argparse
import glob
import json
import os
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from aqa.common.arguments import shell_command
from aqa.common.constants import ASSISTANT_HEADER
from aqa.data.prepare_avqa import QUESTIONS_FILE, REPORT_FILE
from aqa.data.prompts import choices_in
from aqa.evaluation.answers import extract_answer
from aqa.evaluation.scoring import SURE, WHAT_P_IS, guessing_p, paired
from aqa.training.flag_rules import has_checkpoint
from aqa.training.flags import has_split

TRAIN_SCRIPT = "train_colocate.py"
EVALUATION_FOLDER = "eval/rows"  # a file for each evaluation, with a record for each answer
RESULT_ENDS = (".json", ".partial.jsonl")  # of a finished evaluation and of an unfinished one
ONE_ANSWER = 0.9  # so large a share of the answers is nearly all of them
ENOUGH = 20  # questions of a type that tell whether the sound matters to it
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
    "health/anomalies": "warnings, printed once a kind; health/anomalies in metrics.jsonl counts all",
    "health/skipped_steps": "optimizer steps left out",
    "health/failed_saves": "checkpoints that could not be written",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON Lines, such as ``metrics.jsonl``, in the order of the steps.

    :param path: The result is empty if there is no such file. A last line that was cut off is left out.
    """
    records = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
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
    files = evaluations(run)
    if not files:
        return unmeasured(run, flags)
    first, last = read_answers(files[min(files)]), read_answers(files[max(files)])
    if not first[False].keys() & last[False].keys():
        return (
            f"the first and the last evaluation, {files[min(files)]} and {files[max(files)]}, asked different questions"
        )
    when = "before" if min(files) == 0 else f"at step {min(files)}"
    when = "after the warm start" if when == "before" and flags.get("sft_steps") else when
    told = against(first[False], last[False])
    (before, after), questions = told["accuracy"], f"{told['total']} questions"
    sentence = f"held-out accuracy {before:.3f} {when}, {after:.3f} after step {max(files)}"
    sentence += f" ({questions}, p={told['mcnemar_p']:.1g}): {verdict(first[False], last[False])}"
    if len(files) == 1:
        sentence = f"held-out accuracy {after:.3f} after step {max(files)} ({questions}), not measured before"
    if last[True]:
        told = against(last[True], last[False])
        sign = "it listens" if is_better(told) else "no sign that it listens"
        if is_better(told) and (unheard := unheard_types(last)):
            sign += f", no sign of it for: {', '.join(unheard)}"
        sentence += f"; in silence {told['accuracy'][0]:.3f} (p={told['mcnemar_p']:.1g}): {sign}"
    else:
        sentence += "; --eval_silent would tell whether it listens"
    return sentence + (f". {WHAT_P_IS}" if "p=" in sentence else "")


def unmeasured(run: Path, flags: Mapping[str, Any]) -> str:
    """Why a run without answers to evaluation data has none, or where others are."""
    if flags.get("eval_benchmark"):
        return f"the answers to {flags['eval_benchmark']} are in {run / 'eval'}; compare a file's first with its last"
    if any(is_accuracy(name) for record in read_metrics(run / "metrics.jsonl") for name in record):
        return "see the evaluation's accuracies; their answers, which a test needs, were not kept"
    sources = (flags.get("eval_data") or flags.get("prompt_data") or "none").split(",")
    there = flags.get("eval_data") or all(has_split(source, flags.get("eval_split", "")) for source in sources)
    advice = [] if flags.get("eval_steps", -1) > 0 else ["add --eval_steps 100"]
    advice += [] if there else ["hold rows out by avqa.py --val_ratio 0.2"]
    return "not measured on held-out data" + f": {', and '.join(advice)}" * bool(advice)


def evaluations(run: Path) -> dict[int, Path]:
    """Files of the answers to the evaluation data, by step, in no order."""
    records = read_metrics(run / "metrics.jsonl")
    files = {int(f.stem.removeprefix("step_")): f for f in (run / EVALUATION_FOLDER).glob("step_*.jsonl")}
    # a run that was resumed to end earlier leaves files of later steps
    return {step: file for step, file in files.items() if not records or step <= records[-1]["step"]}


Answers = dict[tuple, dict[str, Any]]  # records of a file of answers, by question


def read_answers(file: Path) -> dict[bool, Answers]:
    """An evaluation's answers with sound (False) and in silence (True)."""
    found: dict[bool, Answers] = {False: {}, True: {}}
    for record in read_metrics(file):  # of which some of other origin have null
        found[record["silent"]][row_key(record)] = record
    return found


def row_key(record: dict[str, Any]) -> tuple:
    """What tells a record's question apart: its row, and all of it, since a resumed run may have other data."""
    return (record["row"], record["prompt"], record["reference"])


def is_right(record: dict[str, Any]) -> bool:
    """Whether an answer is right."""
    return record.get("accuracy_reward", record["reward"]) > 0


def against(first: Answers, second: Answers) -> dict[str, Any]:
    """Both compared on the questions that both have, by McNemar's exact test."""
    shared = [key for key in first if key in second]
    return paired([is_right(first[key]) for key in shared], [is_right(second[key]) for key in shared])


def is_better(told: dict[str, Any]) -> bool:
    """Whether a comparison's second answers are better than the first, and not by chance."""
    return told["mcnemar_p"] < SURE and told["difference"] > 0


def verdict(first: Answers, last: Answers) -> str:
    """What the answers before and after training tell, and whether that is chance."""
    told = against(first, last)
    sure = told["mcnemar_p"] < SURE
    if sure and told["difference"] < 0:
        return "it has become worse"
    if gives_one_answer(last):
        return "it gives one answer to nearly everything: more steps"
    if sure and (chance := guessing(last)):
        return f"better, but it could be guessing ({chance:.3f})"
    return "it has learned" if sure else "too little for a difference"


def gives_one_answer(last: Answers) -> bool:
    """Whether nearly all answers are one text, which earns as much as giving it always."""
    given = Counter(said(record) for record in last.values())
    [(text, times)] = given.most_common(1)
    right = sum(plain(record["reference"]) == text for record in last.values())
    return bool(text) and times >= ONE_ANSWER * len(last) and sum(map(is_right, last.values())) <= right < len(last)


def guessing(last: Answers) -> float | None:
    """The accuracy of guessing, where the answers are not surely better than that, and every question has choices."""
    choices = [choices_in(record["prompt"] or "") for record in last.values()]
    if not all(choices):
        return None
    chances = [1 / len(options) for options in choices]
    return sum(chances) / len(chances) if guessing_p(sum(map(is_right, last.values())), chances) >= SURE else None


def said(record: dict[str, Any]) -> str:
    """The choice that an answer names, or its text."""
    from aqa.rewards.r1_aqa import extract_response  # imports torch

    response = extract_response(ASSISTANT_HEADER + (record.get("response") or ""))
    return plain(extract_answer(response, choices_in(record["prompt"] or "") or []).text)


def plain(text: Any) -> str:
    """A text without answer tags, and with single spaces."""
    return " ".join(re.sub("</?answer>", "", str(text)).split())


def unheard_types(last: dict[bool, Answers]) -> list[str]:
    """Question types, of enough questions, that are not answered better with sound than in silence."""
    types: dict[str, list[tuple]] = defaultdict(list)
    for key in last[False].keys() & last[True].keys():
        for tag in last[False][key].get("tags") or ():
            kind, _, name = tag.partition("/")
            if kind == "question_type":
                types[name].append(key)
    parts = {name: [{k: last[quiet][k] for k in keys} for quiet in (True, False)] for name, keys in types.items()}
    return sorted(name for name, part in parts.items() if len(part[0]) >= ENOUGH and not is_better(against(*part)))


def next_command(args: argparse.Namespace) -> str | None:
    """The command that trains on where the model has not learned yet; else the one that evaluates it on all held-out
    questions, into a new file; else the one that compares the answers to ``--eval_benchmark`` before and after; None
    where there are none of these."""
    if command := more_steps(args):
        return command
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


def more_steps(args: argparse.Namespace) -> str | None:
    """The user's command with twice the steps, where the answers are no better than guessing and there is a checkpoint
    to go on from; None also of several processes, whose launcher's flags are not known here."""
    files = evaluations(Path(args.save_path))
    alone = Path(sys.argv[0]).name == TRAIN_SCRIPT and os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone or len(files) < 2 or not has_checkpoint(args.ckpt_path, args.fsdp):
        return None
    first, last = (read_answers(files[step])[False] for step in (min(files), max(files)))
    records = read_metrics(Path(args.save_path) / "metrics.jsonl")
    worse = is_better(against(last, first)) if first.keys() & last.keys() else True
    if not records or worse or not (gives_one_answer(last) or guessing(last)):
        return None
    steps = 2 * records[-1]["step"]
    typed = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--load_checkpoint", "--no-load_checkpoint"):
        typed.add_argument(flag, action="store_true")
    typed.add_argument("--max_steps")
    typed.add_argument("--allow_changes", nargs="*")
    _, kept = typed.parse_known_args(sys.argv[1:])
    return shell_command(TRAIN_SCRIPT, *kept, "--load_checkpoint", "--max_steps", steps, "--allow_changes", "max_steps")


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
