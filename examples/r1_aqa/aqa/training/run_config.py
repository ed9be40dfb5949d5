"""What ``run_config.json`` says of the program, and ``report.html``, written at the end of a run."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aqa.common.versions import commit_of, installed_versions

CONFIG = "run_config.json"  # config.json is the model's
REPORT_SECONDS = 300  # most time for the report at the end of a run


def describe_program(args: argparse.Namespace, parser: argparse.ArgumentParser, host: str, devices: str) -> dict:
    """Versions, machine, and which flags are not at their default. Nothing of the environment, which holds the keys."""
    return {
        "host": host,
        "code": commit_of(Path(__file__).parent),
        "devices": devices,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version()} | installed_versions(),
        "changed": sorted(
            name for name in vars(parser.parse_args([])) if getattr(args, name) != parser.get_default(name)
        ),
    }


def write_report(run: Path) -> str:
    """Make ``report.html`` in a process of its own, so that whatever goes wrong there does not touch the run.

    :return: A line for the screen: where the report is, or a warning with the reason and how to try again.
    """
    script = Path(__file__).resolve().parents[2] / "report.py"
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, str(script), str(run)], capture_output=True, text=True, timeout=REPORT_SECONDS
        )
        problem = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        failed = done.returncode != 0
    except (OSError, subprocess.SubprocessError) as error:
        problem, failed = [str(error)], True
    if failed:
        return (
            f"WARNING: no report.html: {problem[0] if problem else 'no message'}; the run itself is whole, and "
            f"report.py {run} tries again"
        )
    return f"report    {run / 'report.html'} ({time.perf_counter() - started:.0f} s)"


def read_config(run: Path) -> dict[str, Any] | None:
    """A run's ``run_config.json``; None for a run without it."""
    path = run / CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
