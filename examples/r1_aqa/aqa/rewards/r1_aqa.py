"""R1-AQA's two rule rewards, scored on the response alone, in LightRFT's ``reward_fn`` signature.

Reward = accuracy + format, unweighted, 0 to 2 (R1-AQA, ``src/utils/rewards.py`` and ``src/trainer/grpo_trainer.py``):

- accuracy: 1 if ``math_verify`` finds response and reference equal, or if the stripped text of the first one-line
  ``<answer>...</answer>`` (the whole response where there is none) is the reference (:mod:`aqa.rewards.matching`);
- format: 1 if the whole response is ``<answer>...</answer>``, in think mode ``<think>...</think><answer>...</answer>``.

LightRFT passes the *whole* decoded sequence, special tokens included. Its prompt contains "<answer> </answer>" and its
last token is ``<|im_end|>``, so the rules would give 0 for every sample. :func:`extract_response` finds the response,
and explains why nothing that a model writes can change where it begins.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from aqa.common.constants import ASSISTANT_HEADER, PLAIN_LABEL, THINK_LABEL
from aqa.rewards.matching import ANSWER_CLOSE, ANSWER_OPEN, answers_agree

logger = logging.getLogger(__name__)

_TURN_MARKER = re.compile(r"<\|(?:im_end|endoftext|im_start)\|>")

_THINK_OPEN = "<think>"
_THINK_TO_ANSWER = re.compile(rf"</think>\s*{ANSWER_OPEN}")


def extract_response(query: str, prompt: str | None = None) -> str:
    r"""Cut the response out of a decoded Qwen2-Audio sequence.

    A prompt is ChatML and ends with ``<|im_start|>assistant\n``. In this example it has one user turn, so the response
    begins after the **first** such header. A model may imitate the header, but only later in the text. (If the last
    header counted, a response could open another turn and be scored on that alone.) A caller whose prompts have earlier
    assistant turns passes ``prompt``; the response then begins after as many headers as the prompt has.

    The response ends before the next ``<|im_end|>``, ``<|endoftext|>`` (end of sequence and padding) or
    ``<|im_start|>``. In decoded text a special token and its spelling look the same, so a response that spells out an
    end of turn ends there, too: the reward ignores the rest. White space is kept, because R1-AQA's format rule depends
    on it.

    A query without a header counts as a response alone. A caller that has the exact response does not need this
    function and calls :func:`avqa_combined_reward_fn`.

    :param query: Whole decoded sequence, or a response alone.
    :param prompt: Prompt text as rendered by the chat template, with or without expanded audio placeholders.
    :return: The response without special tokens at its end.
    :raises ValueError: ``prompt`` is given and has no assistant header, or more of them than the query.
    """
    headers = 1
    if prompt is not None:
        headers = prompt.count(ASSISTANT_HEADER)
        if headers == 0:
            raise ValueError(
                f"the prompt has no assistant header {ASSISTANT_HEADER!r}: is its generation prompt missing?"
            )
    start = 0
    for _ in range(headers):
        found = query.find(ASSISTANT_HEADER, start)
        if found < 0:
            if prompt is not None:
                raise ValueError(f"the query has fewer assistant headers than its prompt, which has {headers}")
            break
        start = found + len(ASSISTANT_HEADER)
    end = _TURN_MARKER.search(query, start)
    return query[start : end.start()] if end else query[start:]


def accuracy_reward_fn(content: str, solution: str) -> float:
    """R1-AQA's accuracy reward, 1.0 or 0.0. Takes bounded time and never raises, on any text and in any thread.

    :param solution: Reference text, bare (``dog``) or as R1-AQA wraps it (``<answer>dog</answer>``). A bare one is
        wrapped, as R1-AQA's data set does, because ``math_verify`` reads the two differently.
    """
    if ANSWER_OPEN not in solution or ANSWER_CLOSE not in solution:
        solution = f"{ANSWER_OPEN}{solution}{ANSWER_CLOSE}"
    return float(answers_agree(content, solution))


def format_reward_fn(content: str, enable_think: bool = False) -> float:
    r"""R1-AQA's format reward: 1.0 if the whole response, white space included, has the required form, else 0.0.

    The result is that of ``re.fullmatch`` with ``DOTALL`` of ``<answer>.*?</answer>``, in think mode of
    ``<think>.*?</think>\s*<answer>.*?</answer>``. In a full match ``.*?`` may contain anything, further tags too, so
    only the two ends and ``</think>\s*<answer>`` matter (no two of these tags can overlap). Testing just these takes
    linear time, which the second pattern does not.

    :param enable_think: Require the thinking process before the answer.
    """
    if not content.endswith(ANSWER_CLOSE):
        return 0.0
    if not enable_think:
        return float(content.startswith(ANSWER_OPEN))
    return float(content.startswith(_THINK_OPEN) and _THINK_TO_ANSWER.search(content) is not None)


def avqa_combined_reward_fn(sol: str, gt: str, enable_think: bool = False) -> tuple[float, float, float]:
    """Both rewards of one response and their sum.

    :param gt: Reference text, bare or wrapped in answer tags.
    :param enable_think: Require the thinking process before the answer.
    :return: (total 0.0 to 2.0, accuracy 0.0 or 1.0, format 0.0 or 1.0).
    :raises ValueError: The reference is no string, or an empty one, which would reward empty answers.
    """
    if not isinstance(gt, str) or not gt.replace(ANSWER_OPEN, "").replace(ANSWER_CLOSE, "").strip():
        raise ValueError(f"the reference must be a text that is not empty, not {gt!r}")
    accuracy = accuracy_reward_fn(sol, gt)
    form = format_reward_fn(sol, enable_think=enable_think)
    return accuracy + form, accuracy, form


def reward_fn(
    model_reward_list: Sequence[torch.Tensor],
    labels: Sequence[str] | None,
    queries: Sequence[str],
    refs: Sequence[str],
    label_map: Mapping[str, int] | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Score a batch; LightRFT calls it in ``RewardComputationEngine._aggregate_rewards``.

    :param model_reward_list: Scores of reward models, each of shape (B,). R1-AQA has none; only their device is used.
    :param labels: Rule of each sample, length B. ``avqa_think_rule`` requires the think form. Any other label, or none
        at all, means the plain rule; a label other than ``avqa_rule`` is logged once as a warning.
    :param queries: Whole decoded sequences, special tokens included, length B.
    :param refs: Reference texts, length B.
    :param label_map: Part of LightRFT's signature (label to reward model); unused.
    :return: (rewards, metrics): a float32 tensor of shape (B,), 0 to 2, and tensors of the same shape named
        ``format_reward``, ``accuracy_reward`` and ``rule_reward`` (the total). They are on the device of the model
        scores; without scores, on the current CUDA device if the process has initialised CUDA, else on the CPU.
    :raises ValueError: The lengths differ, or a reference is empty; names the sample.
    """
    return score_batch(model_reward_list, labels, queries, refs, avqa_combined_reward_fn)


def score_batch(
    model_reward_list: Sequence[torch.Tensor],
    labels: Sequence[str] | None,
    queries: Sequence[str],
    refs: Sequence[str],
    score: Callable[[str, str, bool], tuple[float, float, float]],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Score a batch with any rule for one response; :func:`reward_fn` describes the other parameters and the result.

    :param score: ``(response, reference, think) -> (reward, accuracy, format)``.
    :raises ValueError: The lengths differ, or ``score`` raised it; names the sample.
    """
    if labels is None:
        labels = [None] * len(queries)
    if refs is None or not len(queries) == len(refs) == len(labels):
        counts = f"{len(queries)} queries, {'no' if refs is None else len(refs)} references, {len(labels)} labels"
        raise ValueError(f"every query needs one reference and one label: got {counts}")

    scores = []
    for index, (query, ref, label) in enumerate(zip(queries, refs, labels, strict=True)):
        if label not in (PLAIN_LABEL, THINK_LABEL):
            _warn_unknown_label(str(label))
        if ASSISTANT_HEADER not in query:
            _warn_no_header()
        try:
            scores.append(score(extract_response(query), ref, label == THINK_LABEL))
        except ValueError as error:
            raise ValueError(f"sample {index} (label {label!r}): {error}") from error

    table = torch.tensor(scores, dtype=torch.float32, device=_device(model_reward_list)).reshape(-1, 3)
    total, accuracy, form = table.T.contiguous()
    return total, {"format_reward": form, "accuracy_reward": accuracy, "rule_reward": total.clone()}


def _device(model_reward_list: Sequence[Any] | None) -> torch.device:
    """The caller's device: LightRFT adds penalties to the rewards in place, and these are on the actor's device."""
    for scores in model_reward_list or ():
        if isinstance(scores, torch.Tensor):
            return scores.device
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def label_doubts(prompts: Sequence[str], labels: Sequence[str | None]) -> list[str]:
    """Find labels of training rows that name no rule, or another rule than the rendered prompt asks for.

    :return: One line for each kind of mismatch, with the number of rows and the first row.
    """
    kinds = {
        f"have a label that names no rule, so they are scored by {PLAIN_LABEL}": [
            i for i, label in enumerate(labels) if label not in (PLAIN_LABEL, THINK_LABEL)
        ],
        f"are labelled {THINK_LABEL}, but their prompts lack the {_THINK_OPEN} that their format reward requires": [
            i
            for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True))
            if label == THINK_LABEL and _THINK_OPEN not in prompt
        ],
        f"have prompts that say {_THINK_OPEN}, but are not labelled {THINK_LABEL}: their format reward forbids it": [
            i
            for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True))
            if label != THINK_LABEL and _THINK_OPEN in prompt
        ],
    }
    return [
        f"{len(rows)} of {len(prompts)} rows {what} (row {rows[0]}: label {labels[rows[0]]!r})"
        for what, rows in kinds.items()
        if rows
    ]


@lru_cache(maxsize=1024)
def _warn_unknown_label(label: str) -> None:
    logger.warning("unknown label %r: scored by the plain rule %r (known: %r)", label, PLAIN_LABEL, THINK_LABEL)


@lru_cache(maxsize=1)
def _warn_no_header() -> None:
    logger.warning("a query has no assistant header %r, so all of it counts as the response", ASSISTANT_HEADER)
