"""What the machine is: packages, GPU, and the two ceilings that the other figures are held against."""

import os
import platform
import shutil
import subprocess
import tempfile

from aqa.common.versions import installed_versions
from gpu.record import Figures, Section, Skip

PACKAGES = ["torch", "triton", "transformers", "accelerate", "peft", "deepspeed", "vllm", "datasets", "numpy"]
PACKAGES += ["pyarrow", "soundfile", "soxr", "math-verify", "bitsandbytes", "flash-attn", "matplotlib"]
COPIED = 2**32  # bytes; many times any cache


def run(section: Section) -> None:
    section.case("versions", lambda: {"python": platform.python_version()} | dict(installed_versions(PACKAGES)))
    section.case("machine", machine)
    section.case("GPU", gpu)
    section.case("attention with a mask", lambda: attention(section.small))
    section.case("matrix product", lambda: product(section.small))
    section.case("copies", lambda: copies(2**24 if section.small else COPIED))


def machine() -> Figures:
    gib = 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gib
    room = {"temporary files, GiB": shutil.disk_usage(tempfile.gettempdir()).free / gib}
    room |= {"/dev/shm, GiB": shutil.disk_usage("/dev/shm").free / gib} if os.path.isdir("/dev/shm") else {}
    tools = {tool: shutil.which(tool) or "none" for tool in ("nvcc", "cc")}  # DeepSpeed and Triton compile with these
    return {"cores": len(os.sched_getaffinity(0)), "memory, GiB": memory} | room | tools


def gpu() -> Figures:
    import torch

    if not torch.cuda.is_available():
        raise Skip("torch sees no GPU")
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
    asked = subprocess.run(query, capture_output=True, text=True, timeout=20) if shutil.which(query[0]) else None
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "GPUs": torch.cuda.device_count(),
        "GiB": about.total_memory / 2**30,
        "multiprocessors": about.multi_processor_count,
        "compute capability": f"{about.major}.{about.minor}",
        "CUDA": str(torch.version.cuda),
        "driver, clock, power limit": asked.stdout.splitlines()[0] if asked and asked.returncode == 0 else "unknown",
    }


def attention(small: bool) -> Figures:
    """Milliseconds of scaled dot product attention, forward and backward, over a group's row, with each kernel.

    The mask is a group's, which flash attention does not take: what it costs to have one is the ratio to ``causal``.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from gpu.model import DEVICE, DTYPE, median_seconds

    width = 64 if small else 2392
    q, k, v = (torch.randn(1, 32, width, 128, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3))
    mask = torch.ones(width, width, dtype=torch.bool, device=DEVICE).tril()[None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    found: Figures = {}
    for name, arguments in (("causal", {"is_causal": True}), ("mask", {"attn_mask": mask})):
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    seconds = median_seconds(lambda a=arguments: attend(q, k, v, **a).sum().backward(), 5)
            except RuntimeError:  # this kernel does not take it
                continue
            found[f"{name}, {backend.name.lower().removesuffix('_attention')}, ms"] = 1000 * seconds
        seconds = median_seconds(lambda a=arguments: attend(q, k, v, **a).sum().backward(), 5)
        found[f"{name}, torch's choice, ms"] = 1000 * seconds
    return found


def product(small: bool) -> Figures:
    from gpu.model import matrix_peak

    return {"TFLOP/s": matrix_peak(small) / 1e12}


def copies(size: int) -> Figures:
    """GB/s of copies: on the device (bytes read and written), and to and from pinned memory, as sleeping does."""
    import torch

    from gpu.model import DEVICE, median_seconds

    here = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    there = torch.empty_like(here)
    found: Figures = {"on the device, GB/s": 2 * size / median_seconds(lambda: there.copy_(here), 10) / 1e9}
    if DEVICE.type == "cuda":
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        found["to pinned memory, GB/s"] = size / median_seconds(lambda: host.copy_(here), 3) / 1e9
        found["from pinned memory, GB/s"] = size / median_seconds(lambda: here.copy_(host), 3) / 1e9
    return found
