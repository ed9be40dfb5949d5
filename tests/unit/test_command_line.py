"""Mistakes on a command line: one line that names what is meant, before anything slow is imported."""

import re

import pytest
from conftest import EXAMPLE, ROOT, run_code, run_command, run_script

from aqa.common.arguments import expand_home

RUN = """
import runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    print("" if isinstance(end.code, int) else end.code, file=sys.stderr)
slow = {"torch", "transformers", "matplotlib", "vllm", "deepspeed", "datasets", "pyarrow"}
print(sorted(slow & set(sys.modules)))
"""
FILES = ("config.json", "processor_config.json", "tokenizer_config.json")  # without tokenizer.json

EVAL, AVQA = "--model_path MODEL --audio_dir . --out_file OUT.json", "--audio_dir . --local_save_dir OUT"


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("train_colocate.py", "--pretrian x", "arguments: --pretrian x; --pretrian: did you mean --pretrain?"),
        ("train_colocate.py", "--no-bf61", "did you mean --no-bf16?"),
        ("train_colocate.py", "--xyzzy", "unrecognized arguments: --xyzzy (--help"),
        ("train_colocate.py", "--pretrain MODEL", "MODEL: holds no tokenizer.json (copy the"),
        ("train_colocate.py", "--eval_benchmark gone.json --eval_steps 1", "gone.json: no such file"),
        ("eval_mmau.py", "--model_pth=x", "--model_path, --data_file, --audio_dir, --out_file; --model_pth: did"),
        ("eval_mmau.py", "score --bechmark mmau file", "did you mean --benchmark?"),
        ("eval_mmau.py", "compare gone.json also.json", "gone.json: No such file"),
        ("eval_mmau.py", f"{EVAL} --data_file gone", "gone: No such file"),
        ("eval_mmau.py", f"{EVAL} --data_file ROWS", "tokenizer.json (copy the"),
        ("report.py", "x --comparre y", "did you mean --compare?"),
        ("report.py", "gone", "gone/metrics.jsonl: does not exist"),
        ("report.py", "RUN --compare gone", "gone: does not exist"),
        ("doctor.py", "--hlep", "did you mean --help?"),
        ("data_preprocess/avqa.py", "--inptu_jsonl x", "did you mean --input_jsonl?"),
        ("data_preprocess/avqa.py", f"{AVQA} --input_jsonl gone", "gone: no such file"),
        ("data_preprocess/avqa.py", f"{AVQA} --input_jsonl ROWS --pretrain MODEL", "no tokenizer.json"),
        ("data_preprocess/avqa.py", f"{AVQA} --input_jsonl ROWS --pretrain /gone", "/gone: no such"),
        ("data_preprocess/avqa.py", f"{AVQA} --input_jsonl ROWS --prompt_max_len 9", "add --pretrain"),
        ("data_preprocess/get_data.py", "mmau --achive x", "did you mean --archive?"),
        ("data_preprocess/get_data.py", "mmau --questions gone --out_dir OUT", "--questions gone: no such file"),
        # each is told before anything is done that its output cannot be written: ROWS is a file
        ("eval_mmau.py", "--model_path x --audio_dir . --data_file ROWS --out_file ROWS/r.json", "ROWS is no folder"),
        ("select_data.py", "--model_path x --data_file ROWS --out_dir ROWS/x", "ROWS is no folder that can be written"),
        ("data_preprocess/avqa.py", "--audio_dir . --input_jsonl ROWS --local_save_dir ROWS/x", "is no folder that"),
        ("demo/make_model.py", "--rwos x --out_dir OUT", "did you mean --rows?"),
        ("demo/make_model.py", "--rows gone --out_dir OUT", "--rows gone: No such file"),
        ("demo/make_model.py", "--out_dir /dev/null/m", "/dev/null is no folder that can be written to"),
        ("demo/make_data.py", "--sede 1 --out_dir OUT", "did you mean --seed?"),
        ("demo/run_demo.py", "--famly x", "did you mean --family?"),
        ("../../benchmarks/run_all.py", "--demo_dri x", "did you mean --demo_dir?"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, script, arguments, said):
    for name in FILES:
        (tmp_path / "MODEL").mkdir(exist_ok=True)
        (tmp_path / "MODEL" / name).write_text("{}")
    (tmp_path / "MODEL" / "model.safetensors").touch()
    (tmp_path / "ROWS").write_text('{"audio_id": "a", "question": "?", "choices": ["a"]}')
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "metrics.jsonl").touch()
    done = run_code(RUN, EXAMPLE / script, *arguments.split(), path=(), cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if said in line]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr and "usage:" not in done.stderr
    assert done.stdout.splitlines()[-1] == "[]", "a slow import came first"
    assert not (tmp_path / "OUT").exists() and not (tmp_path / "OUT.json").exists()


@pytest.mark.parametrize(
    ("script", "rare"),
    [("train_colocate.py", "--audio_cache_mib"), ("eval_mmau.py", "--tensor_parallel_size"),
     ("data_preprocess/avqa.py", "--sandbox_audio")],
)  # fmt: skip
def test_help_shows_what_matters_and_help_all_the_rest(script, rare):
    short, long = (run_script(script, flag, COLUMNS=80).stdout for flag in ("--help", "--help_all"))
    assert "default: None" not in long
    flags = re.findall(r"^  (--\w+)", short, re.MULTILINE)
    assert len(flags) == 10 and len(short.splitlines()) <= 80 and rare not in short
    assert rare in long and all(flag in long for flag in flags)
    assert len(re.findall(r"^ +(?:python |torchrun )", short, re.MULTILINE)) >= 3


def test_ctrl_c_while_a_script_imports_is_one_line():
    code = "import sys, aqa; sys.argv[0] = 'x/a.py'; raise {}"
    for error, said in (("KeyboardInterrupt", "\na.py: interrupted\n"), ("ValueError", "Traceback")):
        done = run_code(code.format(error), check=False)
        assert done.returncode != 0 and done.stderr[: len(said)] == said


def test_waiting_threads_sleep_in_every_script():
    """OpenMP reads the variable when torch is imported, so it must be set before."""
    code = "import sys, os, aqa.common.arguments; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    assert run_code(code, GOMP_SPINCOUNT=None).stdout.split() == ["3000", "False"]


def test_home_is_replaced_where_a_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["~/a", "--x=~/a", "~/a,~/b", "--x=~/a,b,~/c", "~", "a~/b", "--x=a~", "~nobody-here/a", "--x", "0.5,0.5"]
    me = "/home/me"
    assert list(map(expand_home, words)) == [
        *(f"{me}/a", f"--x={me}/a", f"{me}/a,{me}/b", f"--x={me}/a,b,{me}/c"),
        *(me, "a~/b", "--x=a~", "~nobody-here/a", "--x", "0.5,0.5"),
    ]


def test_make_installs_only_what_is_not_there(tmp_path):
    """The lists' dates do not matter, nor who has installed what they name; a list that has changed does."""
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (tmp_path / "requirements").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    lists = [tmp_path / "requirements" / f"{name}.txt" for name in ("torch", "cpu", "dev")]
    for name, text in (
        ("python", "true"),
        ("pip", 'echo "$*" >> pip.log\n[ -e there ] || ! expr "$*" : ".*--no-index"'),
    ):
        (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)

    def make() -> list[bool]:
        """Which calls of pip could install something."""
        log = tmp_path / "pip.log"
        log.write_text("")
        run_command("make", "setup", cwd=tmp_path)
        return ["--no-index" not in line for line in log.read_text().splitlines()]

    for path in lists:
        path.write_text("package==1\n")
    assert make() == [False, True, True]  # they are not there
    for path in lists:
        path.touch()
    assert make() == []
    (tmp_path / ".venv" / ".ready").unlink()
    (tmp_path / "there").touch()
    assert make() == [False]  # someone else has installed them
    lists[0].write_text("package==2\n")
    (tmp_path / "there").unlink()
    assert make() == [False, True, True]
