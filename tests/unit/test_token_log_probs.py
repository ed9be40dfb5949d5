"""Log-probs in chunks against those of all logits at once: values, gradients, and what they cost in memory."""

import math

import pytest
import torch
from torch import nn

from aqa.common.patch import Patch
from aqa.policy import token_log_probs as module
from aqa.policy.token_log_probs import patch_head, token_log_probs

BIAS = {3: -1e30, 5: 0.7}


def make(dtype=torch.float32, tokens=11, hidden=6, vocabulary=13):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype)
    head.weight.data = torch.randn(vocabulary, hidden, generator=generator).to(dtype)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(6, vocabulary, (tokens,), generator=generator)
    return head, states, targets, torch.randn(tokens, generator=generator)


def reference(head, states, targets, weights, temperature, bias):
    """In float64, from the definition."""
    w, h = head.weight.detach().double().requires_grad_(), states.detach().double().requires_grad_()
    rows = []
    for state, target in zip(h, targets.tolist(), strict=True):
        logits = [(state * row).sum() + bias.get(i, 0.0) for i, row in enumerate(w)]
        scaled = torch.stack(logits) / temperature
        rows.append(scaled[target] - scaled.logsumexp(0))
    values = torch.stack(rows)
    (values * weights.double()).sum().backward()
    return values.detach(), h.grad, w.grad


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("at_once", [13, 40, 10**6])  # one row, three rows, all rows a chunk
@pytest.mark.parametrize(("temperature", "bias"), [(1.0, {}), (0.7, BIAS)])
def test_values_and_gradients_are_those_of_the_definition(monkeypatch, patched, at_once, temperature, bias):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    head, states, targets, weights = make()
    expected, states_grad, weight_grad = reference(head, states, targets, weights, temperature, bias)
    patch = Patch()
    if patched:
        patch_head(patch, head)
    values = token_log_probs(head, states, targets, temperature, bias)
    (values * weights).sum().backward()
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(states.grad.double(), states_grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(head.weight.grad.double(), weight_grad, atol=1e-5, rtol=0)


def test_no_chunk_is_larger_than_allowed(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 40)
    seen = []
    original = module._scaled
    monkeypatch.setattr(
        module, "_scaled", lambda logits, *rest: (seen.append(logits.shape), original(logits, *rest))[1]
    )
    head, states, targets, _ = make()
    patch_head(Patch(), head)
    token_log_probs(head, states, targets).sum().backward()
    assert seen == [(3, 13), (3, 13), (3, 13), (2, 13)] * 2  # forward, and again in backward


def test_bfloat16_weight_gradients_are_added_up_in_float32(monkeypatch):
    """300 chunks of one token each, whose parts are below bfloat16's resolution of the sum."""
    head = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    head.weight.data.zero_()
    states = torch.ones(300, 2, dtype=torch.bfloat16)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2)
    patch_head(Patch(), head)
    token_log_probs(head, states, torch.zeros(300, dtype=torch.long)).sum().backward()
    assert head.weight.grad.tolist() == [[150.0, 150.0], [-150.0, -150.0]]  # 300 times one half


def test_it_is_float32_also_where_a_host_casts_what_goes_into_a_module():
    """As FSDP2 does, whose strategy in LightRFT makes bfloat16 the default, too."""
    head, states, targets, _ = make(torch.bfloat16)
    patch_head(Patch(), head)
    expected = token_log_probs(head, states, targets, 0.7, BIAS)
    head.register_forward_pre_hook(
        lambda _, args: tuple(a.bfloat16() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        values = token_log_probs(head, states, targets, 0.7, BIAS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert values.dtype == expected.dtype == torch.float32
    assert torch.equal(values, expected)


def test_without_tokens_and_with_a_frozen_head():
    head, states, targets, weights = make()
    patch_head(Patch(), head)
    token_log_probs(head, states[:0], targets[:0]).sum().backward()
    assert head.weight.grad.abs().sum() == 0 and states.grad.abs().sum() == 0
    head.weight.requires_grad_(False)
    head.weight.grad = None
    (token_log_probs(head, states, targets) * weights).sum().backward()
    assert head.weight.grad is None and states.grad.abs().sum() > 0


def test_the_head_still_is_one():
    head, states, *_ = make()
    logits = head(states)
    patch = Patch()
    patch_head(patch, head)
    assert torch.equal(head(states), logits)
    patch.undo()
    assert type(head) is nn.Linear
    with_bias = nn.Linear(2, 3)
    patch_head(patch, with_bias)
    assert type(with_bias) is nn.Linear
    uniform = nn.Linear(2, 3)
    nn.init.zeros_(uniform.weight)
    nn.init.zeros_(uniform.bias)
    value = token_log_probs(uniform, torch.ones(1, 2), torch.tensor([1]))
    assert value.item() == pytest.approx(-math.log(3))
