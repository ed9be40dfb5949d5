"""Which LightRFT runs this example, and whether it is one at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def check_host() -> None:
    """Make sure that ``import lightrft`` finds something that can train.

    :raises SystemExit: if nothing is found, or the empty package of that name from PyPI.
    """
    spec = importlib.util.find_spec("lightrft")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "no lightrft to run on: keep this example inside its repository (runtime/ beside examples/), or set "
            "LIGHTRFT_HOME to a LightRFT checkout"
        )
    if not (Path(spec.origin).parent / "trainer").is_dir():
        raise SystemExit(
            f"the lightrft in {spec.origin} is the empty package from PyPI: pip uninstall lightrft, then use this "
            "repository's runtime, or set LIGHTRFT_HOME to a checkout of LightRFT's source"
        )


def check_trainable() -> None:
    """Make sure that training runs on the host at all.

    :raises SystemExit: on LightRFT itself, whose own actor and experience maker the patches do not cover yet.
    """
    import lightrft

    if getattr(lightrft, "HOST", None) != "runtime":
        raise SystemExit(
            f"{describe_host()}: training on LightRFT's own classes is not supported yet, because the audio patches do "
            "not cover them; unset LIGHTRFT_HOME to train on this repository's runtime"
        )


def describe_host() -> str:
    """Name, version and path of the LightRFT in use."""
    import lightrft

    name = "this repository's runtime" if getattr(lightrft, "HOST", None) == "runtime" else "LightRFT"
    version = getattr(lightrft, "__version__", "unknown version")
    return f"{name} {version}, {Path(lightrft.__file__).parent}"
