"""Whole weights of a model that is sharded over the ranks: gathered in buckets of bounded size.

Adapters need peft, which is optional and imported only for them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

from lightrft.utils.families import family_of
from lightrft.utils.weight_names import is_adapter, layer_of, plain_name

Whole = Callable[[Sequence[nn.Parameter]], AbstractContextManager[list[torch.Tensor]]]


class Piece(NamedTuple):
    """A weight of a checkpoint, and what it is made of.

    :param parameters: Its parameter; of an adapted layer also those of the adapter.
    :param layer: The adapted layer, to be merged; else None.
    """

    name: str
    parameters: list[nn.Parameter]
    layer: Any


def pieces_of(module: nn.Module, with_adapters: bool, trained_only: bool = False) -> Iterator[Piece]:
    parameters, adapted, family = dict(module.named_parameters()), {}, family_of(module)
    if with_adapters:
        from lightrft.models.lora import adapted_layers

        adapted = adapted_layers(module)
    trained = {layer_of(plain_name(name)) for name, parameter in parameters.items() if parameter.requires_grad}
    for name, parameter in parameters.items():
        plain = plain_name(name)
        if is_adapter(name) or (trained_only and layer_of(plain) not in trained):
            continue
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        yield Piece(family.checkpoint_name(plain), [parameter] if layer is None else list(layer.parameters()), layer)


def buckets(pieces: Iterable[Piece], limit: int, size_of: Callable[[nn.Parameter], int]) -> Iterator[list[Piece]]:
    """Neighbouring weights together, as many as fit.

    The consumer still holds a bucket's last weight when it gets the next bucket's first one. So that weight counts in
    both, and at most ``limit`` bytes are gathered at any time, or two neighbours if these alone are larger.

    :param size_of: Bytes of a whole parameter.
    """
    bucket: list[Piece] = []
    used = last = 0
    for piece in pieces:
        size = sum(map(size_of, piece.parameters))
        if bucket and used + size > limit:
            yield bucket
            bucket, used = [], last
        bucket.append(piece)
        used, last = used + size, size
    if bucket:
        yield bucket


def gathered_weights(bucket: Sequence[Piece], whole: Whole) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each weight of a bucket; adapters are merged.

    :param whole: Gathers parameters for as long as its context lasts.
    """
    parameters = [parameter for piece in bucket for parameter in piece.parameters]
    with whole(parameters) as tensors:
        values = dict(zip(parameters, tensors, strict=True))
        del tensors
        for piece in bucket:
            if piece.layer is None:
                yield piece.name, values.pop(piece.parameters[0])
            else:
                from lightrft.models.lora import merged

                yield piece.name, merged(piece.layer, values.__getitem__)
