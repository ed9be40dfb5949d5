"""What training shows: lines of 80 columns, colours on terminals alone, --quiet, --verbose, bar and summary."""

import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from aqa.data.prompts import render_prompt
from aqa.training.summary import lesson, next_command, read_metrics, summary, summary_table
from lightrft.utils import progress
from lightrft.utils.console import Console, paint
from lightrft.utils.progress import step_lines

METRICS = {"rollout/reward": 1.2265, "rollout/accuracy_reward": 0.5, "rollout/response_length": 8.04}
METRICS |= {"train/kl": 0.08151, "rollout/logprob_gap_mean": 1.4e-8, "rollout/logprob_gap_max": 1.4e-6}
METRICS["time/data"] = 0.004
METRICS |= {"time/rollout": 0.531, "time/logprobs": 0.1, "time/train": 0.13, "time/sync": 0.04, "time/step": 1.26}
SCRIPT = """
import os, sys
from pathlib import Path
from lightrft.utils.console import console, paint
from lightrft.utils.progress import Progress
console.quiet = "quiet" in sys.argv
console.redirect(Path(sys.argv[1]))
console.status("starting ...")
console.print(paint("first", "bold"))
progress = Progress(total=2, shown=True)
progress.phase("rollout")
console.warn("look")
progress.step("step 1", "more")
progress.phase("train")
progress.close()
console.print("the end", needed=True)
"""


def on_terminal(log: Path, *arguments: str, **variables: str) -> str:
    """What a terminal of 80 columns receives."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "runtime"), "COLUMNS": "80", "NO_COLOR": "", **variables}
    command = [sys.executable, "-c", SCRIPT, str(log), *arguments]
    done = subprocess.run(command, env=environment, stdout=theirs, stderr=theirs, timeout=120)
    os.close(theirs)
    received = b""
    try:
        while part := os.read(ours, 100_000):
            received += part
    except OSError:  # what Linux raises at the end of a terminal
        pass
    os.close(ours)
    assert done.returncode == 0, received
    return received.decode()


# ------------------------------------------------------------------------------------------------------------ the lines
def test_the_line_of_a_step():
    assert step_lines(98, 100, METRICS) == [
        "step  98/100  reward 1.23  acc 0.50  len 8.0  kl 0.082  avg gap 1e-08  1.3 s"
    ]


def test_evaluations_have_a_line_of_their_own():
    evaluated = {"eval/accuracy_reward": 0.25, "eval/accuracy_reward_silent": 0.125, "eval/mmau/accuracy": 0.5}
    evaluated |= {"eval/mmau_silent/accuracy": 0.375, "eval/reward": 1.0, "eval/my_silent/accuracy": 0.75}
    lines = step_lines(4, 4, METRICS | evaluated)
    assert len(lines) == 2
    said = "accuracy 0.250  accuracy in silence 0.125  mmau 0.500  mmau in silence 0.375  my_silent 0.750"
    assert lines[1] == paint(f"eval 4/4  {said}", "bold")


def test_verbose_adds_the_phases(monkeypatch):
    monkeypatch.setattr(progress.console, "verbose", True)
    lines = step_lines(4, 4, METRICS)
    assert lines[1:] == [paint("     seconds: data 0.00  rollout 0.53  logprobs 0.10  train 0.13  sync 0.04", "dim")]


numbers = st.floats(-999.0, 9999.0) | st.just(float("nan"))
METRIC_VALUES = dict.fromkeys(METRICS, numbers) | {"rollout/logprob_gap_mean": st.just(0.0) | st.floats(1e-45, 9999.0)}


@given(st.integers(1, 9_999), st.fixed_dictionaries(METRIC_VALUES), st.booleans())
def test_lines_fit_80_columns(step, metrics, verbose):
    progress.console.verbose = verbose
    try:
        lines = step_lines(step, 9_999, metrics)
    finally:
        progress.console.verbose = False
    plain = [line.removeprefix("\x1b[2m").removesuffix("\x1b[0m") for line in lines]
    assert max(map(len, plain)) <= 80, plain


def test_the_time_that_is_left_is_told_from_the_steps_that_were_made(monkeypatch, capsys):
    """The first step is slow and does not count; then 2 s a step, and 3.6 s on average with evaluations."""
    clock = iter([60.0, 64.0, 92.0])  # ends of steps 1, 3 and 10
    bar = progress.Progress(total=1005, done=5)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(progress.console, "stream", sys.stdout)
    for _ in range(10):
        bar.step()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "about 33 min to go, at 2.0 s a step",
        "about 59 min to go, at 3.6 s a step",
    ]  # 997 x 2, 990 x 32 / 9


# --------------------------------------------------------------------------------------------------------- the terminal
def test_a_terminal_gets_colours_the_bar_and_the_status_and_the_log_none_of_it(tmp_path):
    shown = on_terminal(tmp_path / "log")
    assert "\r\x1b[Kstarting ..." in shown
    assert "\r\x1b[K\x1b[1mfirst\x1b[0m\r\n" in shown  # in the status's place
    assert "rollout  " in shown and "| 0/2" in shown and "train    " in shown and "| 1/2" in shown
    assert "\r\x1b[33mWARNING (rank 0):\x1b[0m look\r\n" in shown  # in the bar's place, which is drawn again below
    assert shown.rstrip().endswith("the end")
    assert (tmp_path / "log").read_text() == "first\nstep 1\nmore\nthe end\n"


def test_no_color(tmp_path):
    shown = on_terminal(tmp_path / "log", NO_COLOR="1")
    assert "\x1b[1m" not in shown and "\x1b[33m" not in shown
    assert "first\r\n" in shown and "WARNING (rank 0): look\r\n" in shown


def test_quiet_shows_warnings_and_what_is_needed_and_logs_all(tmp_path):
    shown = on_terminal(tmp_path / "log", "quiet")
    assert shown == "\x1b[33mWARNING (rank 0):\x1b[0m look\r\nthe end\r\n"
    assert (tmp_path / "log").read_text() == "first\nstep 1\nmore\nthe end\n"


def test_a_file_gets_plain_lines(capsys):
    console = Console()
    console.stream = sys.stdout
    console.status("starting ...")
    console.print(paint("first", "bold"), 2)
    console.warn("look")
    assert capsys.readouterr().out == "starting ...\nfirst 2\nWARNING (rank 0): look\n"


# ---------------------------------------------------------------------------------------------------------- the summary
def records(count: int) -> list[dict]:
    shared = {"rollout/format_reward": 1.0, "train/grad_norm": None, "health/failed_saves": 0.0}
    return [{"step": step, **METRICS, **shared, "rollout/reward": step / 10} for step in range(1, count + 1)]


def test_the_summary_compares_first_last_and_recent_steps():
    rows = [{"step": 0, "eval/accuracy_reward": 0.25}, *records(20)]
    rows[20] |= {"eval/accuracy_reward": 0.75, "eval/mmau_silent/accuracy": 0.5, "eval/mmau/accuracy": 0.75}
    rows[20] |= {"eval/my_silent/accuracy": 0.25}  # my_silent.json, with sound
    rows[-1] |= {"health/anomalies": 2.0}
    lines = summary_table(rows)
    assert lines[0].split() == ["step", "1", "step", "20", "mean", "of", "10"]
    cells = {line[:18].strip(): line[18:].split() for line in lines[1:]}
    assert cells["mmau in silence"] == ["0.500", "at", "step", "20"] and "my_silent" in cells
    assert cells["reward"] == ["0.100", "2.000", "1.550"]  # 1.1 to 2.0: 15.5 / 10
    assert cells["held-out accuracy"] == ["0.250", "at", "step", "0", "to", "0.750", "at", "step", "20"]
    assert "gradient norm" not in cells
    assert lines[-1].startswith("2 warnings, printed once a kind; health/anomalies in metrics.jsonl counts all")
    assert max(map(len, lines)) <= 80


def test_short_empty_and_cut_runs(tmp_path):
    assert summary_table(records(1))[0].split() == ["step", "1", "step", "1", "mean", "of", "1"]
    assert summary_table([]) == []
    args = Namespace(save_path=str(tmp_path), eval_benchmark=None, eval_data=None, report=True, sft_steps=0)
    learned, _, *places = summary(args).strip().splitlines()
    assert learned.startswith("learned   not measured on held-out data: add --eval_steps 100, and hold rows out")
    (tmp_path / "validation.parquet").touch()
    held_out = {"prompt_data": str(tmp_path), "eval_split": "validation"}
    assert lesson(tmp_path, held_out) == "not measured on held-out data: add --eval_steps 100"
    hold_out = "hold rows out by avqa.py --val_ratio 0.2"  # what remains where --eval_steps was given
    assert lesson(tmp_path, {"eval_steps": 5}) == f"not measured on held-out data: {hold_out}"
    assert places == [f"model     {tmp_path}", f"metrics   {tmp_path}/metrics.jsonl"]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records(3)) + '{"step": 4, "roll')
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3]
    assert "step 3" in summary(args)


def test_the_next_command_can_be_run_as_it_is(tmp_path, monkeypatch):
    """It names files that are there, and a result that is not there, and is quoted."""
    monkeypatch.chdir(tmp_path)
    sounds, data = tmp_path / "my sounds", tmp_path / "own parquet"
    for folder in (sounds, data):
        folder.mkdir()
    args = Namespace(save_path="a run/", prompt_data="own parquet", eval_data=None, eval_split="validation")
    args.eval_benchmark, args.generate_max_len, args.audio_seconds = None, 16, 30.0

    def words() -> dict[str, str]:
        python, script, *flags = shlex.split(next_command(args))
        assert shutil.which(python) and Path(script) == ROOT / "examples" / "r1_aqa" / "eval_mmau.py"
        return dict(zip(flags[::2], flags[1::2], strict=True))

    assert next_command(args) is None  # nothing is held out
    args.eval_benchmark = "there/mmau.json,other.json"
    (tmp_path / "a run" / "eval").mkdir(parents=True)
    for name in ("step_000000.json", "step_000009.json", "silent_step_000009.json", "step_000010.json.part"):
        name = f"mmau_{name}"
        (tmp_path / "a run" / "eval" / name).touch()
    files = [f"a run/eval/mmau_step_00000{step}.json" for step in (0, 9)]
    assert shlex.split(next_command(args))[2:] == ["compare", *files]
    (data / "validation.json").touch()
    for report in (None, {"x": 1}):  # a folder of select_data.py, which has no report; another program's
        if report:
            (data / "report.json").write_text(json.dumps(report))
        assert (words()["--data_file"], words()["--audio_dir"]) == ("own parquet/validation.json", "own parquet")
    (data / "report.json").write_text(json.dumps({"settings": {"audio_dir": str(sounds)}}))
    for result in ("a run_result.json", "a run_result_2.json", "a run_result_3.json"):
        assert words() == {
            **{"--model_path": "a run/", "--data_file": "own parquet/validation.json", "--audio_dir": "my sounds"},
            **{"--out_file": result, "--max_new_tokens": "16"},
        }
        Path(result).with_suffix(".partial.jsonl" if "2" in result else ".json").touch()  # unfinished, or whole
    sounds.rmdir()  # the data came from another machine
    args.audio_seconds = 600.0
    assert words()["--audio_seconds"] == "600.0"
    args.eval_data = "own parquet/validation.json"
    assert (words()["--data_file"], words()["--audio_dir"]) == ("own parquet/validation.json", "own parquet")


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        # right of 12 questions before, after, and in silence; p = 2 * (1/2)^n where all n that differ are on one side
        ({0: (2, None), 9: (12, 3)}, "0.167 before, 1.000 after step 9 (12 questions, p=0.002): it has learned; in "
         "silence 0.250 (p=0.004): it listens"),
        ({5: (12, None), 9: (5, 5)}, "1.000 at step 5, 0.417 after step 9 (12 questions, p=0.02): it has become worse; "
         "in silence 0.417 (p=1): no sign that it listens"),
        ({0: (4, None), 9: (6, None)}, "0.333 before, 0.500 after step 9 (12 questions, p=0.5): too little for a "
         "difference; --eval_silent would tell whether it listens"),
        # step 20 is of before a resumed run that was to end at step 9
        ({0: (2, None), 9: (12, 12), 20: (0, 0)}, "0.167 before, 1.000 after step 9 (12 questions, p=0.002): it has "
         "learned; in silence 1.000 (p=1): no sign that it listens"),
        ({9: (3, None)}, "0.250 after step 9 (12 questions), not measured before; --eval_silent would tell whether it "
         "listens"),
    ],
)  # fmt: skip
def test_what_was_learned(tmp_path, steps, says):
    folder = tmp_path / "eval" / "rows"
    folder.mkdir(parents=True)
    for step, counts in steps.items():
        lines = [
            {"row": row, "prompt": "", "reference": "", "silent": part > 0, "accuracy_reward": row < right, "reward": 0}
            for part, right in enumerate(counts) if right is not None
            for row in range(12)
        ]  # fmt: skip
        (folder / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "eval/accuracy_reward": 0.5}\n')
    explained = ". p: how often chance alone does as much (McNemar's test); below 0.05 it counts"
    says = f"held-out accuracy {says}{explained if 'p=' in says else ''}"
    assert lesson(tmp_path, {}) == says  # no flags: of a run without run_config.json
    assert lesson(tmp_path, {"sft_steps": 5}) == says.replace(" before, ", " after the warm start, ")
    shutil.rmtree(folder)  # as where LightRFT evaluates, which keeps no answers
    assert lesson(tmp_path, {}).startswith("see the evaluation's accuracies; their answers")


LISTENS = "in silence 0.500 (p=1e-07): it listens, no sign of it for: game"


@pytest.mark.parametrize(
    ("before", "after", "silent", "says"),
    [
        # answers to question i of 48, whose right ones are a, b, c and d in turn: before, after, and in silence
        (lambda i: "b" if i % 4 == 0 else "a", lambda i: "a", lambda i: "a",
         "it gives one answer to nearly everything: more steps; in silence 0.250 (p=1): no sign that it listens"),
        (lambda i: "abcd"[i % 4], lambda i: "a", None,
         "it has become worse; --eval_silent would tell whether it listens"),
        (lambda i: "x", lambda i: "abcd"[i % 4] if i < 16 else "x", None,
         "better, but it could be guessing (0.250); --eval_silent would tell whether it listens"),
        (lambda i: "x", lambda i: "abcd"[i % 4], lambda i: "abcd"[i % 4] if i % 2 else "x",
         f"it has learned; {LISTENS}"),
    ],
    ids=["one answer", "worse", "guessing", "one type is not heard"],
)  # fmt: skip
def test_what_was_learned_beyond_guessing(tmp_path, monkeypatch, before, after, silent, says):
    folder = tmp_path / "eval" / "rows"
    folder.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    for step, rounds in ((0, [before]), (9, [after, silent])):
        lines = [
            {"row": i, "prompt": render_prompt("?", list("abcd"), False), "reference": "abcd"[i % 4],
             "tags": ["question_type/game" if i % 2 else "question_type/bird"], "silent": quiet, "reward": 0,
             "response": f"<answer>{answer(i)}</answer>", "accuracy_reward": float(answer(i) == "abcd"[i % 4])}
            for quiet, answer in zip((False, True), rounds, strict=False) if answer
            for i in range(48)
        ]  # fmt: skip
        (folder / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"): {says}" in lesson(tmp_path, {})
    (tmp_path / "_actor").mkdir()
    args = Namespace(save_path=str(tmp_path), ckpt_path=str(tmp_path), fsdp=False, eval_data=None, prompt_data="none")
    args.eval_benchmark = args.eval_split = None
    typed = ["--max_steps", "9", "--pass_rate", "0.1", "0.9", "--init_kl_coef=0", "--load_checkpoint"]
    monkeypatch.setattr(sys, "argv", ["examples/train_colocate.py", *typed, "--allow_changes", "max_steps"])
    assert next_command(args) is None  # there is nothing to go on from
    (tmp_path / "_actor" / "latest").touch()
    goes_on = shlex.split(next_command(args) or "")[2:]
    further = ["--load_checkpoint", "--max_steps", "18", "--allow_changes", "max_steps"]
    assert goes_on == ([*typed[2:6], *further] if "it has " not in says else [])
