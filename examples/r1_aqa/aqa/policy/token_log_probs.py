"""Log-probabilities of given tokens, without the logits of all positions in memory at once."""

from typing import Any

import torch
from torch import nn

LOGITS_AT_ONCE = 2**25  # elements of a chunk of logits: 128 MiB in float32, 215 tokens of Qwen2-Audio's vocabulary


def patch_head(patch: Any, head: nn.Module) -> None:
    """Let the language model's head return log-probabilities when it is called with targets.

    They are computed inside the head's forward: the hooks of ZeRO-3 and FSDP2 gather its weight for that call, and do
    so once, however many chunks a rank needs.

    :param patch: Takes the replacement (``aqa.common.patch.Patch``).
    :param head: ``lm_head``; left alone unless it is a plain linear layer without bias.
    """
    if type(head).forward is nn.Linear.forward and head.bias is None:
        patch.override(head, "forward", _head_forward)


def _head_forward(self: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor | None = None, *more: Any) -> Any:
    if targets is None:
        return nn.Linear.forward(self, hidden)
    return TokenLogProbs.apply(hidden, self.weight, targets, *more)


def token_log_probs(
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    logit_bias: dict[int, float] | None = None,
) -> torch.Tensor:
    """Log-probabilities of tokens under ``softmax((hidden @ weight.T + bias) / temperature)``.

    :param head: ``lm_head``, patched or not.
    :param hidden: ``(tokens, hidden size)``.
    :param targets: Token ids ``(tokens,)``.
    :param temperature: Logits are divided by it.
    :param logit_bias: Added to the logits of these token ids.
    :return: ``(tokens,)`` float32.
    """
    # the bias is passed as numbers, because FSDP2 would cast a tensor argument to the weights' dtype
    bias = logit_bias or {}
    if type(head).forward is _head_forward:
        return head(hidden, targets, temperature, bias)
    return _log_probs(head(hidden), targets, temperature, bias)


def _scaled(logits: torch.Tensor, temperature: float, bias: dict[int, float]) -> torch.Tensor:
    logits = logits.float()
    if bias:
        ids = torch.tensor(list(bias), dtype=torch.long, device=logits.device)
        values = torch.tensor(list(bias.values()), dtype=torch.float32, device=logits.device)
        logits = logits.index_add(1, ids, values.expand(len(logits), -1))
    return logits if temperature == 1.0 else logits / temperature


def _log_probs(logits: torch.Tensor, targets: torch.Tensor, temperature: float, bias: dict[int, float]) -> torch.Tensor:
    return -nn.functional.cross_entropy(_scaled(logits, temperature, bias), targets, reduction="none")


class TokenLogProbs(torch.autograd.Function):
    """:func:`token_log_probs` in chunks of at most :data:`LOGITS_AT_ONCE` logits, which the backward pass makes again.

    With p the softmax of a token's logits z / T and y its target, d log p_y / d z = (onehot(y) - p) / T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        bias: dict[int, float],
    ) -> torch.Tensor:
        """
        :param hidden: ``(tokens, hidden size)``.
        :param weight: ``(vocabulary, hidden size)``.
        :param targets: ``(tokens,)``.
        :param temperature: See :func:`token_log_probs`.
        :param bias: Added to the logits of these token ids.
        :return: ``(tokens,)`` float32.
        """
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.bias = temperature, bias
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for rows in _chunks(len(hidden), len(weight)):
            out[rows] = _log_probs(hidden[rows] @ weight.T, targets[rows], temperature, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """
        :param grad: Of the log-probabilities ``(tokens,)``.
        :return: Gradients of hidden and weight.
        """
        hidden, weight, targets = ctx.saved_tensors
        chunks = _chunks(len(hidden), len(weight))
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for rows in chunks:
            logits = _scaled(hidden[rows] @ weight.T, ctx.temperature, ctx.bias)
            grad_logits = logits.softmax(-1).neg_()
            grad_logits.scatter_add_(1, targets[rows, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits = grad_logits.mul_(grad[rows, None] / ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if ctx.needs_input_grad[1]:
                part = grad_logits.T @ hidden[rows]
                if len(chunks) > 1 and part.dtype != torch.float32:
                    part = part.float()  # a sum of many parts in bfloat16 would lose the small ones
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
                del part
            del logits, grad_logits  # otherwise they would still take memory while the next chunk's are computed
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        elif ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, grad_weight, None, None, None


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, start + size) for start in range(0, tokens, size)]
