"""A frozen tower's outputs, kept and shared: the same values and gradients, each clip encoded once, memory bounded."""

import copy
import functools
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from support.policies import as_actor, batch_of, build_model, mixed_cases

from aqa.families.audio_flamingo3 import AudioFlamingo3
from aqa.families.qwen2_audio import Qwen2Audio, encode_valid_frames
from aqa.hosts.runtime import RuntimeHost
from aqa.policy import forward as policy
from aqa.policy.tower_cache import TowerCache, share_tower_outputs
from lightrft.engines.vllm_engine import VLLMEngine
from lightrft.trainer.fast_exp_maker import forward


def freeze_tower(model):
    policy.parts_of(model).tower.requires_grad_(False)
    return model


def log_probs_and_grads(model, batch):
    model.zero_grad()
    values = forward(as_actor(model), batch)
    values.sum().backward()
    return values.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_values_and_gradients_are_those_without_it(monkeypatch):
    plain, cached = (freeze_tower(build_model()) for _ in range(2))
    reference = copy.deepcopy(cached).requires_grad_(False)
    cache = share_tower_outputs(cached, reference)
    encoded = []
    original = policy._tower_states
    monkeypatch.setattr(
        policy, "_tower_states", lambda tower, x, n: encoded.append(n.tolist()) or original(tower, x, n)
    )
    batch = batch_of(mixed_cases())
    expected, grads = log_probs_and_grads(plain, batch)
    encoded.clear()
    for _ in range(2):
        values, cached_grads = log_probs_and_grads(cached, batch)
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
        assert grads.keys() == cached_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(cached_grads[name], grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(forward(as_actor(reference), batch), expected, atol=1e-5, rtol=0)
    assert len(encoded) == 1  # by the first of three passes
    assert cache.hits == 2 * cache.misses == 2 * len(encoded[0])


def test_a_clip_that_differs_in_one_value_or_in_length_is_another():
    clip = torch.randn(128, 3000)
    other = clip.clone()
    other[5, 99] += 1e-3
    beyond = clip.clone()
    beyond[5, 102] += 1.0  # not valid, and no guard row
    assert TowerCache.key(clip, 100) == TowerCache.key(beyond, 100)
    assert len({TowerCache.key(clip, 100), TowerCache.key(other, 100), TowerCache.key(clip, 99)}) == 3


def test_it_holds_no_more_than_allowed_and_drops_what_was_not_used_for_longest():
    cache = TowerCache(limit_bytes=2 * 40)
    values = {key: torch.full((2, 5), float(i)) for i, key in enumerate((b"a", b"b", b"c"))}
    cache.put(b"a", values[b"a"])
    cache.put(b"b", values[b"b"])
    assert torch.equal(cache.get(b"a"), values[b"a"])
    cache.put(b"c", values[b"c"])
    assert cache.get(b"b") is None and torch.equal(cache.get(b"a"), values[b"a"]) and cache.used_bytes == 80
    cache.put(b"d", torch.zeros(21))  # 84 bytes
    assert cache.get(b"d") is None and cache.used_bytes == 80


def test_towers_that_train_or_differ_are_refused():
    with pytest.raises(ValueError, match=r"the audio tower trains \(conv1.weight\)"):
        share_tower_outputs(build_model())
    one, other = (freeze_tower(build_model()) for _ in range(2))
    policy.parts_of(other).tower.layer_norm.bias[3] += 1e-3
    with pytest.raises(ValueError, match=r"differ \(layer_norm.bias\)"):
        share_tower_outputs(one, other)


def test_a_reference_model_on_another_device_is_compared_there(monkeypatch):
    """As on a GPU, where a whole reference model waits in the machine's memory: torch compares on one device only."""
    policy_model, reference = freeze_tower(build_model()), freeze_tower(build_model()).to("meta")
    devices = []
    monkeypatch.setattr(torch, "equal", lambda a, b: devices.append((a.device.type, b.device.type)) or True)
    share_tower_outputs(policy_model, reference)
    assert set(devices) == {("cpu", "cpu"), ("meta", "meta")}


@pytest.mark.parametrize("family", [Qwen2Audio, AudioFlamingo3])
def test_vllms_tower_gives_the_same_with_it_and_encodes_each_clip_once(family):
    """The tower as vLLM calls it; that the engine agrees with the trainer, training tests show."""
    tower = policy.parts_of(build_model()).tower.eval()
    engine = SimpleNamespace(family=family, llm=None, keep_tower_outputs=None)
    worker = SimpleNamespace(get_model=lambda: SimpleNamespace(audio_tower=tower))
    engine.llm = SimpleNamespace(collective_rpc=lambda function, args: function(worker, *args))
    caches = []
    engine.keep_tower_outputs = lambda cache: caches.append(cache) or VLLMEngine.keep_tower_outputs(engine, cache)
    models = [SimpleNamespace(model=freeze_tower(build_model()))]
    strategy = SimpleNamespace(inference_engine=engine, unwrap_model=lambda model: model)
    RuntimeHost().share_tower(Namespace(engine_type="vllm", zero_stage=3, fsdp=False), strategy, models)
    cache, encode = caches[0], functools.partial(encode_valid_frames, tower, None)
    frames = torch.tensor([57, 300, 301])
    clips = torch.randn(3, tower.config.num_mel_bins, 3000)
    states = (frames - 1) // 2 + 1
    mask = torch.zeros(3, 1, 1500, 1500).masked_fill(torch.arange(1500) >= states[:, None, None, None], -torch.inf)
    tokens = (states // 2).tolist()
    encoded = []
    tower.layers[0].register_forward_pre_hook(lambda layer, args: encoded.append(len(args[0])))
    with torch.inference_mode():
        expected = encode(clips, mask)
        for order in ([0, 1], [1, 2, 0], [0]):
            found = tower(clips[order], mask[order])
            found = found if family is AudioFlamingo3 else found.last_hidden_state
            assert found.shape[1] == max(tokens[i] for i in order)
            for clip, i in zip(found, order, strict=True):
                torch.testing.assert_close(clip[: tokens[i]], expected[i, : tokens[i]], atol=1e-5, rtol=0)
    assert encoded == [3, 2, 1] and (cache.hits, cache.misses) == (3, 3)
