"""Names of parameters: in the live model, in a checkpoint, in an engine; and a checksum to compare their values."""

import re

import torch

_ADAPTED = re.compile(r"\.(?:base_layer|lora_[AB]\.default)(?=\.)")  # the parts that peft inserts into names


def plain_name(name: str) -> str:
    """Live name without what peft inserts: of an adapted layer's parameters, the name the layer had before."""
    return _ADAPTED.sub("", name)


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return ".lora_" in name


def layer_of(name: str) -> str:
    """The layer that a parameter is loaded with: all of it is sent to an engine, or nothing.

    :param name: Parameter name, live or of a checkpoint.
    :return: The module that owns it; for a projection the block around it, because engines fuse projections of a block
        (q, k and v; gate and up) into one layer.
    """
    module = name.rpartition(".")[0]
    block, _, leaf = module.rpartition(".")
    return block if leaf.endswith("_proj") else module


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's memory as 64-bit words, modulo 2**64: any one bit that differs changes it.

    Exact, so that neither the order of summation nor the size of an update matters, and quick: one pass, no copy.

    :param tensor: Any tensor. If it fills whole words, its checksum is the sum of those of parts that do, too.
    :return: int64 in two's complement, ``()``, on the same device: nobody waits for it until it is read.
    """
    octets = tensor.detach().reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()  # torch views words at whole words only
    whole = len(octets) // 8 * 8
    total = octets[:whole].view(torch.int64).sum()
    if whole < len(octets):
        rest = octets.new_zeros(8)
        rest[: len(octets) - whole] = octets[whole:]
        total = total + rest.view(torch.int64)[0]
    return total


def read_checksums(sums: dict[str, torch.Tensor]) -> dict[str, int]:
    """The values of some :func:`checksum`, fetched from the device all at once.

    A sum of such tensors wraps around, and so remains a checksum.
    """
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}
