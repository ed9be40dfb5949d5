"""Sizes against real models: the demo's, and one of Qwen2-Audio-7B's shape without memory (torch's meta device)."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from aqa.training.freezing import freeze
from aqa.training.model_sizes import (
    KNOWN,
    PARTS,
    SizeError,
    count,
    decoder_flops,
    head_flops,
    parameters,
    read_sizes,
    sizes_of,
    tower_flops,
    trained,
)
from lightrft.models.actor_al import load_model
from lightrft.models.lora import add_adapters

SEVEN_B = "Qwen/Qwen2-Audio-7B-Instruct"


def on_meta(config):
    with torch.device("meta"):
        return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**config))


def seven_b():
    return on_meta({name: value for name, value in KNOWN[SEVEN_B].items() if name != "model_type"})


def shapes(model):
    return {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}


def test_every_parameter_of_the_7b_model():
    model, known = seven_b(), parameters(read_sizes(SEVEN_B))
    assert {p.name: (p.shape, not p.fixed) for p in known} == shapes(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {p.name.removesuffix(".weight") for p in known if p.linear} == linear
    assert count(known) == 8_397_094_912
    whole = {"audio_tower": model.model.audio_tower, "multi_modal_projector": model.model.multi_modal_projector}
    whole |= {"language_model": model.model.language_model, "lm_head": model.lm_head}
    for part in PARTS:
        assert count(known, part) == sum(p.numel() for p in whole[part].parameters())


def test_every_parameter_of_the_demos_model(tiny_model):
    model = on_meta(json.loads((tiny_model / "config.json").read_text()))
    assert {p.name: (p.shape, not p.fixed) for p in parameters(read_sizes(str(tiny_model)))} == shapes(model)


def test_grouped_queries():
    text = {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    audio = {"model_type": "qwen2_audio_encoder", "encoder_layers": 1, "encoder_attention_heads": 2, "d_model": 32}
    config = {"text_config": text, "audio_config": audio | {"encoder_ffn_dim": 48}}
    assert {p.name: (p.shape, not p.fixed) for p in parameters(sizes_of(config))} == shapes(on_meta(config))


@pytest.mark.parametrize(
    "parts", [["audio_tower"], ["multi_modal_projector", "layers.[01]"], ["embed_tokens", "lm_head", "*norm"]]
)
def test_what_trains_beside_frozen_parts(parts):
    model = seven_b()
    freeze(model, parts)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.name for p in trained(read_sizes(SEVEN_B), parts, 0, [])} == names


@pytest.mark.parametrize("targets", [["language_model"], ["q_proj", "fc1"]])
def test_what_trains_of_adapters(targets):
    model = seven_b()
    add_adapters(model, 8, 16, targets, "base")
    real = {n.replace(".default", ""): tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert {p.name: p.shape for p in trained(read_sizes(SEVEN_B), [], 8, targets)} == real


def test_unknown_names_are_refused(tmp_path):
    sizes = read_sizes(SEVEN_B)
    with pytest.raises(SizeError, match="--freeze_prefix tower"):
        trained(sizes, ["tower"], 0, [])
    with pytest.raises(SizeError, match="--target_modules lm_head"):
        trained(sizes, [], 8, ["lm_head"])
    with pytest.raises(SizeError, match="--pretrain who/knows"):
        read_sizes("who/knows")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SizeError, match="'llama'"):
        read_sizes(str(tmp_path))


def test_floating_point_operations_of_the_demos_model(tiny_model):
    sizes = read_sizes(str(tiny_model))
    model = load_model(str(tiny_model), attn_implementation="eager").eval()
    tower, projector, decoder = model.model.audio_tower, model.model.multi_modal_projector, model.model.language_model

    def counted(work):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = work()
        return counter.get_total_flops(), out

    features = torch.zeros(1, 128, 3000)
    flops, _ = counted(lambda: projector(tower(features).last_hidden_state))
    assert flops == pytest.approx(tower_flops(sizes, 30), rel=1e-3)
    embeds = torch.zeros(2, 40, sizes.width)
    flops, out = counted(lambda: decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state)
    assert flops == pytest.approx(decoder_flops(sizes, 80, 40), rel=1e-3)
    flops, _ = counted(lambda: model.lm_head(out))
    assert flops == head_flops(sizes, 80)
