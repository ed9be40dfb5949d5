"""Which lightrft is in use: the empty package from PyPI and nothing at all are refused, others are named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLE, ROOT, run_command

import lightrft
from aqa.hosts.current import describe_host
from aqa.hosts.locate import check_host

TESTED = " at commit unknown (tested: 0.1.1 at commit 49e62cb)"  # tmp_path is no checkout


def ask(code: str, *folders: Path, example: Path = EXAMPLE) -> subprocess.CompletedProcess:
    """Run code in a process of its own that finds ``lightrft`` in these folders alone."""
    code = f"from aqa.hosts.current import *\nfrom aqa.hosts.locate import *\n{code}"
    path = os.pathsep.join(map(str, [example, *folders]))
    # -S: not the one of an installed package
    return run_command(sys.executable, "-S", "-c", code, check=False, cwd=ROOT / "tests", PYTHONPATH=path)


def make_package(folder: Path, source: str | None, trainer: bool = False) -> Path:
    package = folder / "lightrft"
    package.mkdir()
    if source is not None:
        (package / "__init__.py").write_text(source, encoding="utf-8")
    if trainer:
        (package / "trainer").mkdir()
    return folder


def test_the_runtime_is_accepted_and_described():
    check_host()
    folder = Path(lightrft.__file__).parent
    assert describe_host() == f"this repository's runtime {lightrft.__version__}, {folder}"


@pytest.mark.parametrize(
    ("call", "package", "says"),
    [
        ("check_host()", "", "lightrft in {}/lightrft/__init__.py is the empty package from PyPI: pip uninstall lig"),
        ("check_host()", None, "no lightrft to run on"),  # a folder without __init__.py
        ("check_host()", "no folder", "no lightrft to run on"),
        ("find_host()", "no folder", "LIGHTRFT_HOME={} holds no lightrft/__init__.py"),
    ],
)
def test_what_is_no_host_is_refused(tmp_path, monkeypatch, call, package, says):
    if call == "find_host()":
        monkeypatch.setenv("LIGHTRFT_HOME", str(tmp_path))
    if package != "no folder":
        make_package(tmp_path, package)
    done = ask(call, tmp_path)
    assert done.returncode == 1
    assert says.format(tmp_path) in done.stderr and "LIGHTRFT_HOME" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("source", "project", "description"),
    [
        ("__version__ = '0.1.1'", "", "LightRFT 0.1.1"),
        ("", "[project]\nversion = '0.1.2'\n", "LightRFT 0.1.2"),  # of a checkout
        ("", "", "LightRFT unknown version"),
    ],
)
def test_another_host_is_named_with_version_and_path(tmp_path, source, project, description):
    make_package(tmp_path, source, trainer=True)
    (tmp_path / "pyproject.toml").write_text(project)
    done = ask("check_host()\nprint(describe_host())", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{description}{TESTED}, {tmp_path / 'lightrft'}"


def test_the_check_imports_nothing_heavy():
    done = ask("import sys\ncheck_host()\nprint(sorted({'lightrft', 'torch'} & set(sys.modules)))", ROOT / "runtime")
    assert done.stdout.strip() == "[]", done.stderr


FIND = "find_host()\nprint(describe_host())"


def test_lightrft_home_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTRFT_HOME", str(make_package(tmp_path, "__version__ = '0.1.1'", trainer=True)))
    assert ask(FIND).stdout.strip() == f"LightRFT 0.1.1{TESTED}, {tmp_path / 'lightrft'}"


def test_without_it_the_runtime_beside_the_example(monkeypatch):
    monkeypatch.delenv("LIGHTRFT_HOME", raising=False)
    assert ask(FIND).stdout.startswith("this repository's runtime ")


def test_copied_into_a_checkout_that_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTRFT_HOME", raising=False)
    make_package(tmp_path, "__version__ = '0.1.1'", trainer=True)
    copied = shutil.copytree(EXAMPLE, tmp_path / "examples" / "r1_aqa")
    done = ask(FIND, example=copied)
    assert done.stdout.strip() == f"LightRFT 0.1.1{TESTED}, {tmp_path / 'lightrft'}", done.stderr
