"""Process groups, and the few collectives that the runtime needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler


def pick_device() -> torch.device:
    """This rank's device: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init_process_group(device: torch.device, timeout: timedelta = timedelta(minutes=60)) -> None:
    """Join the process group that torchrun describes, or make one of a single process.

    :param device: Decides the backend: nccl on a GPU, gloo on the CPU.
    :param timeout: After which a collective gives up.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    import deepspeed

    # DeepSpeed would compile, with the machine's C++ compiler, a shared-memory reduction that only inference uses
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", timeout=timeout, verbose=False)


def engine_groups(tp_size: int) -> dist.ProcessGroup:
    """Split the ranks into engines of ``tp_size`` neighbours.

    :param tp_size: Ranks an engine; divides the world size.
    :return: The group of this rank's engine.
    """
    mine = None
    for start in range(0, dist.get_world_size(), tp_size):
        ranks = list(range(start, start + tp_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in rank order.

    :param value: Picklable.
    :param group: Default: all ranks.
    """
    if dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def reduce_metrics(sums: dict[str, float], maxima: dict[str, float], device: torch.device) -> None:
    """Add up, respectively take the maximum, over all ranks, in place.

    :param sums: Same keys on every rank.
    :param maxima: Same keys on every rank.
    :param device: Where the reduction runs.
    """
    for values, op in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
        if values and dist.get_world_size() > 1:
            packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
            dist.all_reduce(packed, op=op)
            values.update(zip(values, packed.tolist(), strict=True))


class ResumableSampler(DistributedSampler):
    """A distributed sampler that can begin inside an epoch.

    :attr:`start` is the number of this rank's rows to leave out at the beginning.
    """

    start = 0

    @property
    def repeats_last(self) -> bool:
        """Whether this rank's last row is another rank's, too, and must not be counted.

        With ``drop_last=False`` all ranks get the same number of rows, the first ones twice where that takes more.
        """
        return (self.num_samples - 1) * self.num_replicas + self.rank >= len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.start :])
