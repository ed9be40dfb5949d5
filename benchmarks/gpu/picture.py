"""Where the time of one step of 7B's shape goes: ``step.png`` and, for ui.perfetto.dev, ``trace.json.gz``."""

import gzip
import tempfile
from pathlib import Path

import torch

from gpu.model import DEVICE, build_model, make_batch, matrix_peak, seconds_of
from gpu.record import Figures, Section
from gpu.steps import forward_flops, step

KINDS = {  # of kernels and operators, by parts of their names; the first that fits
    "attention": ("attention", "flash", "fmha"),
    "matrix products": ("gemm", "::mm", "addmm", "bmm", "matmul", "cutlass", "xmma", "linear", "nvjet"),
    "convolution": ("conv",),
    "softmax, cross entropy": ("softmax", "nll_loss"),
    "copies": ("copy", "memcpy", "memset", "cat", "index", "fill", "zero"),
}


def run(section: Section) -> None:
    section.case("profile", lambda: profile(section.small, section.out))


def by_kind(events: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds of each of :data:`KINDS`, and of the rest.

    :param events: Name and seconds of kernels (on a GPU) or operators.
    """
    found = dict.fromkeys((*KINDS, "element by element"), 0.0)
    for name, seconds in events:
        fits = (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))
        found[next(fits, "element by element")] += seconds
    return found


def profile(small: bool, out: Path) -> Figures:
    """Profile a step of 8 responses of 256 tokens.

    :param out: Gets picture and trace.
    :return: Milliseconds by kind of work; ``idle`` is when nothing ran on the GPU.
    """
    model, batch = build_model("small" if small else "7B"), make_batch(8 if small else 256)
    ideal = 3 * forward_flops(model, batch) / matrix_peak(small)
    for _ in range(2):
        step(model, batch)
    with torch.profiler.profile() as profiler:
        seconds = seconds_of(lambda: step(model, batch))
    on_gpu = DEVICE.type == "cuda"
    kernels = [e for e in profiler.events() if not on_gpu or e.device_type == torch.profiler.DeviceType.CUDA]
    kinds = by_kind([(e.name, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6) for e in kernels])
    if on_gpu:
        kinds["idle"] = max(0.0, seconds - sum(kinds.values()))
    figures: Figures = {f"{name}, ms": 1000 * value for name, value in kinds.items()}
    draw(kinds, ideal, seconds, out / "step.png")
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        (out / "trace.json.gz").write_bytes(gzip.compress(trace.read_bytes(), 5))
    return figures | {"step, ms": 1000 * seconds, "at the matrix product's peak, ms": 1000 * ideal}


def draw(kinds: dict[str, float], ideal: float, seconds: float, path: Path) -> None:
    """Bars of seconds by kind, beside what all operations would take at the measured peak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
    names = list(reversed(kinds))
    ax.barh(names, [1000 * kinds[name] for name in names], color="#1f5fa8")
    ax.axvline(1000 * ideal, color="#c0392b", linestyle="--", label="all operations at the measured matrix peak")
    ax.set(xlabel="milliseconds", title=f"One training step, {1000 * seconds:.0f} ms, by kind of work")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
