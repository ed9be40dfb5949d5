#!/usr/bin/env python3
"""Run what the documents show with a duration or an outcome, and keep both.

    python benchmarks/documented.py                            all but what needs a checkout of LightRFT (70 minutes)
    python benchmarks/documented.py --only demo report         some of it
    python benchmarks/documented.py --lightrft_home /path/to/LightRFT

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


@dataclass(frozen=True)
class Run:
    """A documented command.

    :param command: For bash, from the repository's root; ``{venv}`` and ``{out}`` are new folders.
    :param outcome: Of what it left, as plain values: gets ``{venv}`` or ``{out}``'s parent, and what was printed.
    :param lightrft: It needs LightRFT's checkout.
    """

    command: str
    outcome: Callable[[Path, str], dict[str, Any]] = lambda folder, printed: {}
    lightrft: bool = False


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
    return {
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


def train_inside(flags: str) -> str:
    """The demo's training inside LightRFT, on a CPU.

    :param flags: What differs.
    """
    return (
        f"python tests/lightrft_launcher.py {EXAMPLE}/train_colocate.py --pretrain {DEMO}/model "
        f"--prompt_data {DEMO}/parquet --save_path {{out}} --rollout_batch_size 16 --n_samples_per_prompt 8 "
        "--train_batch_size 128 --micro_train_batch_size 32 --micro_rollout_batch_size 32 --generate_max_len 16 "
        f"--actor_learning_rate 1e-3 --init_kl_coef 0.04 --use_kl_loss --no-report {flags}"
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
        f"--audio_dir {DEMO}/data --engine vllm --out_file {{out}}/result.json"
    ),
    "lora": Run(
        f'rm -rf {LORA} && make demo DEMO_DIR={LORA} TRAIN_FLAGS="{ADAPTERS} --actor_learning_rate 1e-2"', summary(LORA)
    ),
    "omni": Run(
        f"rm -rf {OMNI} && python {EXAMPLE}/demo/run_demo.py --family qwen2_5_omni --out_dir {OMNI}", summary(OMNI)
    ),
    "docs": Run("make test-docs", tests),
    "test": Run("make test", tests),
    "faults": Run("make test-faults", tests),
    "soak": Run("make soak"),
    "host_tests": Run("make test-lightrft", tests, lightrft=True),  # first: it installs what LightRFT needs
    "host_zero2": Run(train_inside("--zero_stage 2"), learned, lightrft=True),
    "host_fsdp2": Run(train_inside("--fsdp --bf16"), learned, lightrft=True),
}


def commit() -> str:
    """What is checked out, with a plus where files differ from it."""
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "no git"


def measure(name: str, home: Path | None) -> dict[str, Any]:
    """Run one.

    :param name: Of it.
    :param home: LightRFT's checkout, for those that need it.
    :return: Command, date, commit, seconds, outcome.
    :raises SystemExit: if it fails; the end of what it printed has then been shown.
    """
    run = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        venv, out = Path(folder) / "venv", Path(folder) / "out"
        command = run.command.replace("{venv}", str(venv)).replace("{out}", str(out))
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment |= {"PIP_NO_CACHE_DIR": "1"} | ({"LIGHTRFT_HOME": str(home.resolve())} if run.lightrft else {})
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
    parser.add_argument("--lightrft_home", type=Path, help="checkout of LightRFT, commit 49e62cb")
    args = parser.parse_args()
    names = [name for name, run in RUNS.items() if name in (args.only or RUNS)]
    if args.lightrft_home is None:
        wanted = [name for name in names if RUNS[name].lightrft]
        if args.only and wanted:
            raise SystemExit(f"{', '.join(wanted)}: --lightrft_home must name a checkout of LightRFT")
        names = [name for name in names if name not in wanted]
    earlier = sorted(RESULTS.glob("????-??-??_documented.json"))
    found = json.loads(earlier[-1].read_text(encoding="utf-8")) if earlier else {}
    path = RESULTS / f"{date.today()}_documented.json"
    failed = []
    for name in names:
        print(f"{name:12} {RUNS[name].command}", flush=True)
        try:
            found[name] = measure(name, args.lightrft_home)
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
