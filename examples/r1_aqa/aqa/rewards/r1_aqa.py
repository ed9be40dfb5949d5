"""R1-AQA's two rule rewards, scored on the response alone, in LightRFT's ``reward_fn`` signature.

Reward = accuracy + format, unweighted, 0 to 2 (R1-AQA, ``src/utils/rewards.py`` and ``src/trainer/grpo_trainer.py``):

- accuracy: 1 if ``math_verify`` finds response and reference equal, or if the stripped text of the first one-line
  ``<answer>...</answer>`` (the whole response where there is none) is the reference (:mod:`aqa.rewards.matching`);
- format: 1 if the whole response is ``<answer>...</answer>``, in think mode ``<think>...</think><answer>...</answer>``.

LightRFT passes the *whole* decoded sequence, special tokens included. Its prompt contains "<answer> </answer>" and its
last token is ``<|im_end|>``, so the rules would give 0 for every sample. :func:`extract_response` finds the response,
and explains why nothing that a model writes can change where it begins.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from aqa.common.constants import ASSISTANT_HEADER, PLAIN_LABEL, THINK_LABEL
from aqa.rewards.matching import ANSWER_CLOSE, ANSWER_OPEN, answers_agree

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")  # where no tokenizer is at hand
_END = re.compile(r"<\|(?:im_end|endoftext)\|>")

_THINK_OPEN = "<think>"
_THINK_TO_ANSWER = re.compile(rf"</think>\s*{ANSWER_OPEN}")


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that decoding with ``skip_special_tokens`` leaves out, as R1-AQA decodes."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def extract_response(query: str, special: Sequence[str] = SPECIAL_TOKENS) -> str:
    r"""Cut the response out of a decoded Qwen2-Audio sequence, as R1-AQA's trainer decodes it.

    A prompt is ChatML with one user turn and ends with ``<|im_start|>assistant\n``, so the response begins after the
    **first** such header. A model may imitate the header, but only later in the text. (If the last header counted, a
    response could open another turn and be scored on that alone.) A query without a header is a response alone.

    The response ends before the next ``<|im_end|>`` or ``<|endoftext|>`` (end of sequence and padding). Special tokens
    before that are left out: R1-AQA decodes without them. In decoded text a special token and its spelling look the
    same, so a response that spells out an end of turn ends there, too: the reward ignores the rest. White space is
    kept, because R1-AQA's format rule depends on it.

    :param query: Whole decoded sequence, or a response alone.
    :param special: The tokenizer's, see :func:`special_tokens`.
    """
    _, header, response = query.partition(ASSISTANT_HEADER)
    response = _END.split(response if header else query, 1)[0]
    return _pattern(tuple(special)).sub("", response)


@lru_cache
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the tokens, and the longest where one begins as another does."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


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
    :raises ValueError: As :func:`check_reference`.
    """
    check_reference(gt)
    accuracy = accuracy_reward_fn(sol, gt)
    form = format_reward_fn(sol, enable_think=enable_think)
    return accuracy + form, accuracy, form


def check_reference(gt: str) -> None:
    """Refuse a reference to which no answer can be compared.

    :raises ValueError: The reference is no string, or an empty one, which would reward empty answers.
    """
    if not isinstance(gt, str) or not gt.replace(ANSWER_OPEN, "").replace(ANSWER_CLOSE, "").strip():
        raise ValueError(f"the reference must be a text that is not empty, not {gt!r}")


def reward_fn(
    model_reward_list: Sequence[torch.Tensor],
    labels: Sequence[str] | None,
    queries: Sequence[str],
    refs: Sequence[str],
    label_map: Mapping[str, int] | None,
    special: Sequence[str] = SPECIAL_TOKENS,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Score a batch; LightRFT calls it in ``RewardComputationEngine._aggregate_rewards``.

    :param model_reward_list: Scores of reward models, each of shape (B,). R1-AQA has none; only their device is used.
    :param labels: Rule of each sample, length B. ``avqa_think_rule`` requires the think form. Any other label, or none
        at all, means the plain rule; a label other than ``avqa_rule`` is logged once as a warning.
    :param queries: Whole decoded sequences, special tokens included, length B.
    :param refs: Reference texts, length B.
    :param label_map: Part of LightRFT's signature (label to reward model); unused.
    :param special: See :func:`extract_response`.
    :return: (rewards, metrics): a float32 tensor of shape (B,), 0 to 2, and tensors of the same shape named
        ``format_reward``, ``accuracy_reward`` and ``rule_reward`` (the total). They are on the device of the model
        scores; without scores, on the current CUDA device if the process has initialised CUDA, else on the CPU.
    :raises ValueError: The lengths differ, or a reference is empty; names the sample.
    """
    return score_batch(model_reward_list, labels, queries, refs, avqa_combined_reward_fn, special)


def score_batch(
    model_reward_list: Sequence[torch.Tensor],
    labels: Sequence[str] | None,
    queries: Sequence[str],
    refs: Sequence[str],
    score: Callable[[str, str, bool], tuple[float, float, float]],
    special: Sequence[str] = SPECIAL_TOKENS,
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
            scores.append(score(extract_response(query, special), ref, label == THINK_LABEL))
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
