"""A step of AdamW, fused and not: seconds, memory, and the share of the copy bandwidth that it reaches."""

import functools

import torch

from gpu.model import DEVICE, median_seconds, most_allocated
from gpu.record import Figures, Section, judge

WAYS = {"fused": {"fused": True}, "foreach": {"foreach": True}}
TOUCHED = 7 * 4  # bytes a value: weight, gradient and both moments are read; all but the gradient are written


def run(section: Section) -> None:
    """Run the section. The values are float32, as the optimizer's are in bf16 training, too."""
    values = 2**18 if section.small else 2**30
    for name, tensors in (("a tensor a layer", 64), ("one flat tensor, as DeepSpeed's", 1)):
        section.case(name, lambda t=tensors: compare([values // t] * t))


def compare(sizes: list[int]) -> Figures:
    """Both ways on the same values.

    :param sizes: Values of each tensor.
    """
    figures: Figures = {}
    ends: list[torch.Tensor] = []
    here = torch.empty(sum(sizes), device=DEVICE).normal_()
    copy = median_seconds(functools.partial(torch.empty_like(here).copy_, here), 3) / (2 * 4 * len(here))  # s a byte
    for name, flags in WAYS.items():
        generator = torch.Generator(DEVICE).manual_seed(0)
        parameters = [torch.randn(size, device=DEVICE, generator=generator).requires_grad_() for size in sizes]
        for parameter in parameters:
            parameter.grad = torch.randn(len(parameter), device=DEVICE, generator=generator)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, **flags)
        optimizer.step()  # makes the moments
        memory = most_allocated(optimizer.step)
        seconds = median_seconds(optimizer.step)
        figures[f"{name}, ms"] = 1000 * seconds
        figures[f"{name}, of the copy's bandwidth"] = TOUCHED * sum(sizes) * copy / seconds
        figures[f"{name}, GiB on top"] = memory / 2**30
        ends.append(parameters[0].detach()[:1000].cpu())
    figures["times faster"] = figures["foreach, ms"] / figures["fused, ms"]
    figures["apart by"] = (ends[0] - ends[1]).abs().max().item()
    return judge(figures, **{"apart by": (None, 1e-5)})  # after a few steps of 1e-3: rounding alone is far below
