"""Process groups, and the few collectives that the runtime needs."""

import hashlib
import importlib.metadata
import importlib.util
import os
import socket
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from lightrft.utils.rank_watch import own_address

# flags that may differ between ranks, because only rank 0 uses them
OF_RANK_0 = ("wandb_run_name", "wandb_org", "wandb_group", "wandb_project", "use_wandb", "use_tensorboard")
SAME_VERSIONS = ("torch", "transformers", "deepspeed")  # FSDP2 does without the last
SEEN_WITHIN = 10  # seconds within which a shared file system shows a new file on the other hosts


def pick_device() -> torch.device:
    """This rank's device: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init_process_group(device: torch.device, timeout: timedelta = timedelta(minutes=60)) -> None:
    """Join the process group that torchrun describes, or make one of a single process.

    :param device: Decides the backend: nccl on a GPU, gloo on the CPU.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if dist.is_initialized():
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    address = own_address()
    if address is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo would use the address of the host's name: on Debian and Ubuntu 127.0.1.1, which no other host reaches
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(address)
    several = int(os.environ["WORLD_SIZE"]) > 1
    # a rank that knows its device joins NCCL at once, and its barriers use no other GPU
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu and several else None
    )


def interface_of(address: str) -> str:
    """The network interface that has an address.

    :raises LookupError: if none has it.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    raise LookupError(f"no network interface has the address {address}: set GLOO_SOCKET_IFNAME")


def engine_groups(tp_size: int) -> dist.ProcessGroup:
    """Split the ranks into engines of ``tp_size`` neighbours.

    :param tp_size: Ranks an engine; divides the world size.
    """
    mine = None
    for start in range(0, dist.get_world_size(), tp_size):
        ranks = list(range(start, start + tp_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in rank order."""
    if dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def check_same(values: dict[str, str], remedy: str) -> None:
    """Stop all ranks if they do not have the same values. Collective.

    :param values: By name; the names too must be the same.
    :raises SystemExit: naming the values and who has them.
    """
    differences = []
    everyone = gather_objects((socket.gethostname(), values))
    for name in dict.fromkeys(name for _, theirs in everyone for name in theirs):
        having: dict[str, list[str]] = {}
        for rank, (host, theirs) in enumerate(everyone):
            having.setdefault(theirs.get(name, "nothing"), []).append(f"rank {rank} ({host})")
        if len(having) > 1:
            differences.append(f"  {name}: " + "; ".join(f"{value} on {_few(who)}" for value, who in having.items()))
    if differences:
        raise SystemExit("\n".join(["the ranks of this run differ:", *differences, remedy]))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_same_run(args: Any) -> None:
    """Stop all ranks if they were given different arguments, or do not share the folder of checkpoints. Collective.

    :raises SystemExit: naming what differs.
    """
    if dist.get_world_size() == 1:
        return
    flags = {f"--{name}": str(value) for name, value in sorted(vars(args).items()) if name not in OF_RANK_0}
    versions = {name: importlib.metadata.version(name) for name in SAME_VERSIONS if importlib.util.find_spec(name)}
    check_same(flags | versions, "Start all hosts with the same flags, and the same environment.")
    if not args.disable_ds_ckpt:
        check_shared(Path(args.ckpt_path))


def check_shared(folder: Path) -> None:
    """Stop all ranks if they do not see the same files in a folder. Collective.

    :raises SystemExit: naming the folder and who does not see what rank 0 has written.
    """
    probe, failure = folder / f".seen_by_{socket.gethostname()}_{os.getpid()}", None
    mine = dist.get_rank() == 0
    if mine:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            failure = str(error)
    probe, failure = gather_objects((probe, failure))[0]
    if failure:
        raise SystemExit(f"--ckpt_path {folder}: rank 0 cannot write there: {failure}")
    deadline = time.monotonic() + SEEN_WITHIN
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    everyone = gather_objects((socket.gethostname(), seen))
    if mine:
        probe.unlink()
    blind = [f"rank {rank} ({host})" for rank, (host, seen) in enumerate(everyone) if not seen]
    if blind:
        raise SystemExit(
            f"--ckpt_path {folder.absolute()}: {_few(blind)} does not see what rank 0 ({everyone[0][0]}) writes there. "
            "Each rank writes its part of a checkpoint, so the folder must be on a file system that all hosts share; "
            "or give --disable_ds_ckpt, and nothing can be resumed."
        )


def digest(rows: Iterable[Any]) -> str:
    """A short hash of rows of plain values, to compare them between ranks."""
    state = hashlib.blake2b(digest_size=6)
    for row in rows:
        state.update(repr(row).encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def reduce_metrics(sums: dict[str, float], maxima: dict[str, float], device: torch.device) -> None:
    """Sum ``sums`` and maximise ``maxima`` over all ranks, in place.

    :param sums: Same keys on every rank.
    :param maxima: Same keys on every rank.
    """
    for values, op in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
        if values and dist.get_world_size() > 1:
            packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
            dist.all_reduce(packed, op=op)
            values.update(zip(values, packed.tolist(), strict=True))


def reduce_by_name(sums: dict[Any, float], device: torch.device) -> dict[Any, float]:
    """Add up over all ranks sums whose names differ between ranks. Collective.

    :param sums: By names that can be sorted; a name that a rank lacks counts as 0 there.
    :return: All names of all ranks, sorted.
    """
    names = sorted(set().union(*gather_objects(list(sums))))
    whole = {name: sums.get(name, 0.0) for name in names}
    reduce_metrics(whole, {}, device)
    return whole


class ResumableSampler(DistributedSampler):
    """A distributed sampler that can begin inside an epoch.

    :attr:`start` is the number of this rank's rows to leave out at the beginning.
    """

    start = 0

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.start :])
