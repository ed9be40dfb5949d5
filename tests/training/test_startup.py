"""A Python that lacks the packages is told so in one line."""

import sys

import pytest
from conftest import EXAMPLE, ROOT, run_command

EVALUATION = "--model_path m --data_file nowhere.json"


@pytest.mark.parametrize(
    ("missing", "script", "arguments"),
    [
        ("torch, transformers", "train_colocate.py", "--pretrain ."),
        ("torch, transformers", "eval_mmau.py", f"{EVALUATION} --out_file out.json --audio_dir ."),
        ("torch, transformers", "select_data.py", f"{EVALUATION} --out_dir out"),
        ("torch, transformers", "export_checkpoint.py", "--checkpoint . --pretrain m --out out"),
        ("torch, transformers", "report.py", "."),
        ("numpy, torch, transformers", "demo/make_model.py", "--out_dir out"),
        ("numpy, torch, transformers", "demo/run_demo.py", ""),
        (
            "pyarrow, soundfile",
            "data_preprocess/avqa.py",
            "--input_jsonl m.jsonl --audio_dir . --local_save_dir p",
        ),
        ("pyarrow, soundfile", "data_preprocess/get_data.py", "avqa --questions m.jsonl --media . --out_dir p"),
    ],
)
def test_a_python_without_packages_is_told_where_they_are(tmp_path, missing, script, arguments):
    for name in ("metrics.jsonl", "m.jsonl"):
        (tmp_path / name).write_text("{}")
    # -S: none but Python's own
    done = run_command(sys.executable, "-S", EXAMPLE / script, *arguments.split(), cwd=tmp_path, check=False)
    assert done.returncode in (1, 2), done.stderr
    made = ROOT / ".venv/bin/activate"  # with -S no Python is in an environment
    assert missing in done.stderr and (f"source {made}" if made.is_file() else "Prerequisites") in done.stderr
    assert "Traceback" not in done.stderr
