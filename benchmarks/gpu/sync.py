"""What a weight sync costs beside one copy on the device: checksums, and gathering of sharded weights.

Without vLLM: each weight is copied into memory of its own, as vLLM's loader does where its layers have the checkpoint's
names, with the checksums before and after that ``VLLMEngine.load_weights`` compares.
"""

import importlib.util

import torch
from bench_sync import strategy_flags

from gpu.model import DEVICE, DTYPE, build_model, median_seconds
from gpu.record import Figures, Section, Skip, judge

LIMIT = 2.0  # times a copy
BUCKETS = (0, 128, 512)  # MiB; 0: weights are gathered one by one


def run(section: Section) -> None:
    section.case("checksums", lambda: checksums("small" if section.small else "7B"))
    for kind in ("FSDP2", "ZeRO-3"):
        section.case(f"gathering, {kind}", lambda k=kind: gathering(k, "small" if section.small else "2 layers of 7B"))


def checksums(size: str) -> Figures:
    """All weights copied, and copied with both checksums."""
    from lightrft.utils.weight_names import checksum, read_checksums

    sent = [parameter.detach() for parameter in build_model(size, patched=False).parameters()]
    room = [torch.empty_like(tensor) for tensor in sent]

    def copy() -> None:
        for own, tensor in zip(room, sent, strict=True):
            own.copy_(tensor)

    def compared() -> None:
        before = {str(i): checksum(tensor) for i, tensor in enumerate(sent)}
        copy()
        after = {str(i): checksum(own) for i, own in enumerate(room)}
        if read_checksums(before) != read_checksums(after):
            raise RuntimeError("what arrived is not what was sent")

    seconds, both = median_seconds(copy), median_seconds(compared)
    figures = {"weights": len(sent), "GiB": sum(t.nbytes for t in sent) / 2**30, "copy, ms": 1000 * seconds}
    figures |= {"copied and compared, ms": 1000 * both, "times a copy": both / seconds}
    return judge(figures, **{"times a copy": (None, LIMIT if DEVICE.type == "cuda" and size == "7B" else None)})


def gathering(kind: str, size: str) -> Figures:
    """Weights of a sharded model of one rank, each copied into memory of its own, in buckets of several sizes.

    :param kind: ``FSDP2`` or ``ZeRO-3``.
    """
    if kind == "FSDP2":
        from lightrft.strategy.fsdp_strategy import FSDPStrategy as Strategy
    else:
        if importlib.util.find_spec("deepspeed") is None:
            raise Skip("DeepSpeed is not installed")
        from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy as Strategy
    strategy = Strategy(strategy_flags(zero_stage=3, bf16=torch.bfloat16 == DTYPE))
    engine, *_ = strategy.prepare_training(build_model(size, patched=False), 1)
    sent = {name: tensor.clone() for name, tensor in strategy.named_weights(engine)}
    room = {name: torch.empty_like(tensor) for name, tensor in sent.items()}

    def copy() -> None:
        for name, tensor in sent.items():
            room[name].copy_(tensor)

    def gather(bucket: int) -> None:
        strategy.args.sync_bucket_mb = bucket
        for name, tensor in strategy.named_weights(engine):
            room[name].copy_(tensor)

    seconds = median_seconds(copy)
    figures: Figures = {"GiB": sum(t.nbytes for t in sent.values()) / 2**30, "copy, ms": 1000 * seconds}
    for bucket in BUCKETS:
        figures[f"{bucket} MiB a bucket, times a copy"] = median_seconds(lambda b=bucket: gather(b)) / seconds
    return figures
