"""LoRA by peft: small trained matrices beside frozen linear layers, in the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from lightrft.models.four_bit import unpacked
from lightrft.utils.families import family_of

ADAPTER = "default"  # the name that peft gives to a model's only adapter


def add_adapters(model: nn.Module, rank: int, alpha: int, targets: Sequence[str], base: str) -> LoraConfig:
    """Freeze a model and put adapters beside some of its linear layers.

    :param model: Of a known family, changed in place; its class and the names of its modules stay.
    :param alpha: The product weighs ``alpha / rank``.
    :param targets: What to adapt: names of linear layers (``q_proj``) or of modules that hold them
        (``language_model``). The head is never adapted: log-probs are computed from its weight. Nor is what audio and
        text do not pass.
    :param base: Checkpoint that the model is from, for the adapter's configuration.
    :return: peft's configuration, which :func:`write_adapter` saves.
    :raises ValueError: if a target is not in the model.
    """
    family = family_of(model)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and name.split(".")[0] not in family.unheard
    ]
    wanted = {family.language_model if target == "language_model" else target for target in targets}
    for target in sorted(wanted):
        if not any(target in name.split(".") for name in linear):
            raise ValueError(f"--target_modules {target}: no linear layer of the model has that name or is below it")
    chosen = [name for name in linear if wanted & set(name.split("."))]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, base_model_name_or_path=base)
    inject_adapter_in_model(config, model)
    return config


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Module name to layer, of those with an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merged(layer: LoraLayer, whole: Callable[[nn.Parameter], torch.Tensor] = unpacked) -> torch.Tensor:
    """Weight of a plain layer that does what the adapted one does: base + ``alpha / rank`` * B A.

    :param whole: Gives the whole value of each of its parameters; default: they are.
    :return: A new tensor in the base weight's dtype.
    """
    parts = layer.get_base_layer().weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return merge(*map(whole, parts), layer.scaling[ADAPTER])


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """``weight + scaling * b @ a``, formed in float32, in the weight's dtype.

    Source: Hu et al., LoRA (2021), section 4.1.
    """
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(weight.dtype)


def write_adapter(config: LoraConfig, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter as peft loads it (``PeftModel.from_pretrained(base, folder)``).

    :param weights: Live names and values of the adapters' parameters, in CPU memory.
    :param folder: Made if needed; the configuration is written last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)


class WithoutAdapters:
    """A reference model that costs no memory: the actor with its adapters switched off."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.modality = actor.modality

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with switched_off(self.actor.model):
            return self.actor(*args, **kwargs)

    def to(self, _: Any) -> WithoutAdapters:
        """Nothing to move: the actor stays where it is."""
        return self


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let adapted layers do what their base layers do."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
