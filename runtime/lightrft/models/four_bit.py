"""Frozen weights at 4 bits, the base of LoRA adapters. bitsandbytes is optional, so it is imported in functions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig


def four_bit_config(dtype: torch.dtype, whole: Sequence[str]) -> BitsAndBytesConfig:
    """QLoRA's quantisation, of the language model's linear layers alone.

    :param whole: Live names of modules that are not packed.
    :raises ImportError: if bitsandbytes is not installed.

    Source: Dettmers et al., QLoRA (2023), section 3: NF4 and double quantisation.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError("weights at 4 bits need bitsandbytes: pip install bitsandbytes") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(whole),
    )


def prepare(model: nn.Module) -> None:
    """Let 4-bit layers train adapters, and be resumed.

    On CPUs with AVX512-BF16 bitsandbytes (0.50.2) packs a layer's weight in another way the first time that it is
    evaluated, for good, and what it computes from such a weight has no gradient: switched off. And its state dicts hold
    the scales of a weight, which it does not read again: they must be those that the model has from its checkpoint.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.register_load_state_dict_pre_hook(_compare_scales)


def _compare_scales(
    module: Any,
    state: dict[str, torch.Tensor],
    prefix: str,
    _meta: Any,
    _strict: bool,
    _missing: Any,
    _extra: Any,
    errors: list[str],
) -> None:
    for name, own in module.weight.quant_state.as_dict(packed=True).items():
        stored = state.pop(f"{prefix}weight.{name}", None)
        if stored is None or not torch.equal(stored.cpu(), own.cpu()):
            errors.append(f"{prefix}weight: its 4-bit scales ({name}) are not those of --pretrain")


def unpacked(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's value: of a 4-bit one what the forward pass makes of it, of any other itself, not copied."""
    state = getattr(parameter, "quant_state", None)  # bitsandbytes' Params4bit alone has one
    if state is None:
        return parameter.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state)
