"""R1-AQA's two rule rewards, scored on the response alone, in LightRFT's ``reward_fn`` signature.

Reward = accuracy + format, unweighted, 0 to 2 (R1-AQA, ``src/utils/rewards.py`` and ``src/trainer/grpo_trainer.py``):

- accuracy: 1 if ``math_verify`` finds response and reference equal, or if the stripped text of the first one-line
  ``<answer>...</answer>`` (the whole response where there is none) is the reference (:mod:`aqa.rewards.matching`);
- format: 1 if the whole response is ``<answer>...</answer>``, in think mode ``<think>...</think><answer>...</answer>``.

LightRFT hands over the *whole* decoded sequence, special tokens included. Its prompt itself says "<answer> </answer>"
and its end is ``<|im_end|>``, so that scoring it as it comes gives 0 for every sample. :func:`extract_response` says
what the response is and why nothing that a response writes can move that border.
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
    begins after the **first** such header: everything that a model writes comes later, so no header that it imitates
    can be the one. (Searching for the last header would let a response open a better one.) A caller whose prompts
    have earlier assistant turns passes ``prompt``; the response then begins after as many headers as it has, whatever
    the expansion of its audio placeholders.

    The response is one turn: it ends before the first ``<|im_end|>``, ``<|endoftext|>`` (end of sequence and padding)
    or ``<|im_start|>`` after that. Decoded text cannot tell a token from its spelling, so this holds for both: what
    follows an imitated end of turn does not exist for the reward, neither to gain nor to lose. White space is kept,
    because R1-AQA's format rule minds it.

    A query without a header is taken for a response that was handed over alone. A caller that has the exact response
    needs none of this: it calls :func:`avqa_combined_reward_fn`.

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
    """R1-AQA's accuracy reward. Never raises on any text, in any thread, and takes bounded time.

    :param content: Response text.
    :param solution: Reference text, bare (``dog``) or as R1-AQA wraps it (``<answer>dog</answer>``). A bare one is
        wrapped, as R1-AQA's data set does, because ``math_verify`` reads the two differently.
    :return: 1.0 or 0.0.
    """
    if ANSWER_OPEN not in solution or ANSWER_CLOSE not in solution:
        solution = f"{ANSWER_OPEN}{solution}{ANSWER_CLOSE}"
    return float(answers_agree(content, solution))


def format_reward_fn(content: str, enable_think: bool = False) -> float:
    r"""R1-AQA's format reward: the whole response, white space included, has the asked-for form.

    Equal to ``re.fullmatch`` with ``DOTALL`` of ``<answer>.*?</answer>``, in think mode of
    ``<think>.*?</think>\s*<answer>.*?</answer>``. Under a full match ``.*?`` may hold anything, further tags too, so
    only both ends and one border matter (no two of these tags can overlap); written out, the test is linear in the
    length, which the second pattern is not.

    :param content: Response text.
    :param enable_think: Ask for the thinking process before the answer.
    :return: 1.0 or 0.0.
    """
    if not content.endswith(ANSWER_CLOSE):
        return 0.0
    if not enable_think:
        return float(content.startswith(ANSWER_OPEN))
    return float(content.startswith(_THINK_OPEN) and _THINK_TO_ANSWER.search(content) is not None)


def avqa_combined_reward_fn(sol: str, gt: str, enable_think: bool = False) -> tuple[float, float, float]:
    """Both rewards of one response and their sum.

    :param sol: Response text.
    :param gt: Reference text, bare or wrapped in answer tags.
    :param enable_think: Score the think form.
    :return: (total 0.0 to 2.0, accuracy 0.0 or 1.0, format 0.0 or 1.0).
    :raises ValueError: The reference is no text or an empty one, which would pay for an empty answer.
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

    :param model_reward_list: Scores of reward models, each of shape (B,). R1-AQA has none: only their device is used.
    :param labels: Rule of each sample, length B: ``avqa_think_rule`` asks for the think form; any other label, or no
        labels at all, means the plain rule, and one that is not ``avqa_rule`` is warned of once.
    :param queries: Whole decoded sequences, special tokens included, length B.
    :param refs: Reference texts, length B.
    :param label_map: Label to reward model; part of the signature, without meaning for rules.
    :return: (rewards, metrics): a float32 tensor of shape (B,), 0 to 2, and the tensors of the same shape
        ``format_reward``, ``accuracy_reward`` and ``rule_reward`` (the total). All are on the caller's device: that of
        the model scores; without any, the CUDA device in use if the process has initialised CUDA, else the CPU.
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
    """Score a batch by a rule for one response.

    :param model_reward_list: See :func:`reward_fn`, as the next three.
    :param labels: See there.
    :param queries: See there.
    :param refs: See there.
    :param score: ``(response, reference, think) -> (reward, accuracy, format)``.
    :return: See there.
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
    """The caller's device: LightRFT adds penalties on the actor's device to the rewards in place."""
    for scores in model_reward_list or ():
        if isinstance(scores, torch.Tensor):
            return scores.device
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def label_doubts(prompts: Sequence[str], labels: Sequence[str | None]) -> list[str]:
    """What the labels of training rows do not fit: the rules, or what the prompts ask for.

    :param prompts: Rendered prompts.
    :param labels: Rule of each.
    :return: A line for each kind of doubt, with the number of rows and the first of them.
    """
    kinds = {
        f"have a label that is no rule: they are scored by {PLAIN_LABEL}": [
            i for i, label in enumerate(labels) if label not in (PLAIN_LABEL, THINK_LABEL)
        ],
        f"are labelled {THINK_LABEL}, but their prompts do not say {_THINK_OPEN}, which their format reward wants": [
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
    logger.warning("a query has no assistant header %r: taken for a response alone", ASSISTANT_HEADER)
