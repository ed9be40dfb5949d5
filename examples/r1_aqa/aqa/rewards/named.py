"""Rewards by name: R1-AQA's, some others, a user's own ``module:function``, and sums of these and of further parts.

A reward is a function ``(response, reference, think) -> number``: the response's text without special tokens, the gold
answer, and whether the thinking process was asked for. Accuracy and format by R1-AQA's rule are measured beside it.

Those of :data:`NAMED` return total, accuracy and format. To them an answer that is the right one of the prompt's
choices by its label or text, such as "B" or "beep" for "(B) beep", is the gold answer. The accuracy that is measured is
the one that they pay, so that the screen, reports and ``--keep_best`` show what is trained for.
"""

import importlib
import io
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from aqa.common.constants import ASSISTANT_HEADER, THINK_LABEL
from aqa.data.prompts import choices_in
from aqa.rewards.choices import find_choice
from aqa.rewards.matching import ANSWER_CLOSE, ANSWER_OPEN, first_answer, texts_equal
from aqa.rewards.parts import BRIEF_WORDS, PARTS, count_words, read_response
from aqa.rewards.r1_aqa import (
    SPECIAL_TOKENS,
    avqa_combined_reward_fn,
    check_reference,
    extract_response,
    format_reward_fn,
    reward_fn,
    score_batch,
)

Reward = Callable[[str, str, bool], float]
BatchReward = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]  # as aqa.rewards.r1_aqa.reward_fn
Scores = tuple[float, float, float]  # total, accuracy (0 or 1), R1-AQA's format (0 or 1)
NamedReward = Callable[[str, str, bool], Scores]
LONGEST_COST = 0.5  # the most that length can cost
LONGEST_OUTPUT = 2_000  # characters that a reward may print while it scores one batch
LARGEST = torch.finfo(torch.float32).max  # rewards are float32

EXAMPLE = str(Path(__file__).resolve().parents[2])
USER = "user_reward"  # a package that is made for the user's module, so that it takes nobody else's name


def exact(response: str, reference: str, think: bool) -> Scores:
    """Format, and accuracy by comparing text alone, because ``math_verify`` takes "about 2 cats" for "some 2 dogs".

    :return: The total is 0.0, 1.0 or 2.0.
    :raises ValueError: As :func:`aqa.rewards.r1_aqa.check_reference`.
    """
    check_reference(reference)
    wrapped = f"{ANSWER_OPEN}{reference.replace(ANSWER_OPEN, '').replace(ANSWER_CLOSE, '')}{ANSWER_CLOSE}"
    accuracy, form = float(texts_equal(response, wrapped)), format_reward_fn(response, think)
    return accuracy + form, accuracy, form


def graded_format(response: str, reference: str, think: bool) -> Scores:
    """Accuracy, and format in degrees: 1 for the whole form, else half the share of its tags that occur exactly once.

    :return: The total is 0.0 to 2.0.
    """
    _, accuracy, form = avqa_combined_reward_fn(response, reference, think)
    tags = [ANSWER_OPEN, ANSWER_CLOSE, *(["<think>", "</think>"] if think else [])]
    return accuracy + (form or 0.5 * sum(response.count(tag) == 1 for tag in tags) / len(tags)), accuracy, form


def length_aware(response: str, reference: str, think: bool) -> Scores:
    """R1-AQA's reward minus a penalty for length, which rises linearly from 0 at 64 words to 0.5 at 128.

    :return: The total is -0.5 to 2.0.
    """
    total, accuracy, form = avqa_combined_reward_fn(response, reference, think)
    beyond = max(0, count_words(response) - BRIEF_WORDS) / BRIEF_WORDS
    return total - LONGEST_COST * min(1.0, beyond), accuracy, form


R1_AQA_PARTS = ("accuracy", "format")  # parts of a sum that reward_fn measures anyway
AUDIO_GAIN = "audio_gain"  # a part that the trainer adds, because it takes the policy's log-probs
NAMED: dict[str, NamedReward] = {"exact": exact, "graded_format": graded_format, "length_aware": length_aware}


def find_reward(
    name: str, weights: Sequence[float] | None = None, words: tuple[int, int] = (0, BRIEF_WORDS), group: int = 1
) -> BatchReward:
    """The reward function for LightRFT's trainer.

    :param name: ``r1_aqa``, one of :data:`NAMED`, or ``module:function``, whose module is looked for in the folder that
        the run was started in, then on ``PYTHONPATH``; or a sum of these and of the parts of :mod:`aqa.rewards.parts`.
    :param weights: Of the sum's parts; ``r1_aqa`` has two, accuracy and format. None: 1 each.
    :param words: See :func:`aqa.rewards.parts.length`.
    :param group: Responses a prompt.
    :return: A function with the signature of :func:`aqa.rewards.r1_aqa.reward_fn`.
    :raises SystemExit: if there is no such function.
    """
    if name == "r1_aqa" and weights is None:
        return reward_fn
    names = ["accuracy", "format"] if name == "r1_aqa" else name.split("+")
    if names == [name] and weights is None and name not in (*PARTS, *R1_AQA_PARTS):
        return score_named(NAMED[name]) if name in NAMED else score_batch_with(_import(name), name)
    weighed = zip(names, weights or [1.0] * len(names), strict=True)
    names, weights = zip(*(pair for pair in weighed if pair[0] != AUDIO_GAIN), strict=True)
    further = {part: partial(PARTS[part], words=words, group=group) for part in names if part in PARTS}
    whole = {part: find_reward(part) for part in names if part not in (*PARTS, *R1_AQA_PARTS)}
    return add_up(names, weights, further, whole)


class Batch(NamedTuple):
    """What a batch reward is given; see :func:`aqa.rewards.r1_aqa.reward_fn`."""

    model_reward_list: Sequence[torch.Tensor]
    labels: Sequence[str] | None
    queries: Sequence[str]
    refs: Sequence[str]
    label_map: Mapping[str, int] | None
    special: Sequence[str] = SPECIAL_TOKENS


def taking_batches(score: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> BatchReward:
    """Give a function of a :class:`Batch` the signature of :func:`aqa.rewards.r1_aqa.reward_fn`."""
    return lambda *args, **kwargs: score(Batch(*args, **kwargs))


def add_up(
    names: Sequence[str], weights: Sequence[float], further: Mapping[str, Callable], whole: Mapping[str, BatchReward]
) -> BatchReward:
    """Make a function that scores a batch by a weighted sum; each part is a metric, too.

    :param further: Those of ``names`` that are in :data:`aqa.rewards.parts.PARTS`; ``whole`` are rewards by themselves.
    """

    @taking_batches
    def chosen(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        _, measured = reward_fn(*batch)
        thinks = [label == THINK_LABEL for label in batch.labels or [None] * len(batch.queries)]
        asked = zip(batch.queries, thinks, strict=True) if further else ()
        responses = [read_response(query, think, batch.special) for query, think in asked]
        total = torch.zeros_like(measured["rule_reward"])
        for name, weight in zip(names, weights, strict=True):
            metric = f"{name.rpartition(':')[2]}_reward"
            if name in further:
                measured[metric] = torch.tensor(further[name](responses), dtype=total.dtype, device=total.device)
            elif name in whole:
                measured[metric], others = whole[name](*batch)
                if name in NAMED and "accuracy" not in names:  # audio_gain pays what this reward counts as right
                    measured["accuracy_reward"] = others["accuracy_reward"]
            total = total + weight * measured[metric]
        return total, measured | {"rule_reward": total.clone()}

    return chosen


def score_named(score: NamedReward) -> BatchReward:
    """Make a function that scores a batch from one of :data:`NAMED`."""

    @taking_batches
    def chosen(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        paid = named_references(batch.queries, batch.refs, batch.special)
        return score_batch(batch.model_reward_list, batch.labels, batch.queries, paid, score, batch.special)

    return chosen


def named_references(queries: Sequence[str], refs: Sequence[str] | None, special: Sequence[str]) -> list[str]:
    """The references, each replaced by the response's own answer where that names the reference among the choices.

    :param queries: Whole decoded sequences; the choices are read from their prompts.
    :param special: See :func:`aqa.rewards.r1_aqa.extract_response`.
    """
    references = list(refs or [])
    for index, (query, reference) in enumerate(zip(queries, references, strict=False)):  # score_batch counts them
        choices = choices_in(query.partition(ASSISTANT_HEADER)[0])
        if choices is not None:
            response = extract_response(query, special)
            answer = first_answer(response)
            answer = (response if answer is None else answer).strip()
            if find_choice(answer, choices, sentences=False) == reference:
                references[index] = answer
    return references


class RewardError(Exception):
    """A reward that ends the process, or that returns no number; the message names it, the value and the sample."""


def score_batch_with(reward: Reward, name: str) -> BatchReward:
    """Make a function that scores a batch from a user's reward.

    :param reward: As the module's docstring describes it.
    :param name: As given to ``--reward``.
    """

    def score(response: str, reference: str, think: bool) -> Scores:
        sample = f"for the response {response!r:.300} (answer {reference!r:.100})"
        try:
            value = reward(response, reference, think)
        except Exception as error:
            error.add_note(f"raised by --reward {name} {sample}")
            raise
        except (SystemExit, GeneratorExit, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                raise  # Ctrl-C, and not the reward
            raise RewardError(f"--reward {name}: ended with {error!r} {sample}; it must return a number") from error
        total = as_number(value)
        if total is None:
            raise RewardError(f"--reward {name}: returned {value!r:.100} {sample}; it must return a finite number")
        return total, 0.0, 0.0

    @taking_batches
    def chosen(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        _, measured = reward_fn(*batch)
        with limited_output(name):
            total, _ = score_batch(*batch[:4], score, batch.special)
        return total, measured | {"rule_reward": total.clone()}

    return chosen


def as_number(value: Any) -> float | None:
    """A reward's value as a float; None if it is no finite number.

    Whatever Python can make a number of is one (bool, NumPy's scalars, tensors without dimensions), but no text.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach()
    if isinstance(value, (str, bytes, bytearray)) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a complex tensor
        return None
    return number if abs(number) <= LARGEST else None  # False for NaN, too


class _LimitedStream(io.TextIOBase):
    """Passes on the first :data:`LONGEST_OUTPUT` characters and counts the others."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._left = LONGEST_OUTPUT
        self.dropped = 0

    def write(self, text: str) -> int:
        self._stream.write(text[: self._left])
        self.dropped += max(0, len(text) - self._left)
        self._left = max(0, self._left - len(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def limited_output(name: str) -> Iterator[None]:
    """Limit what Python code prints meanwhile: a reward that prints each response would fill the log.

    :param name: Of the reward, for the note about what is left out.
    """
    out, err = _LimitedStream(sys.stdout), _LimitedStream(sys.stderr)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        if out.dropped or err.dropped:
            print(f"\n... and {out.dropped + err.dropped} characters more by --reward {name}, left out", flush=True)


def _import(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        found = getattr(_import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SystemExit(
            f"--reward {name}: {error}; it must be module:function, the module in {os.getcwd()} or on PYTHONPATH"
        ) from error
    except SystemExit as error:  # whose status could be 0, as if the training had succeeded
        raise SystemExit(f"--reward {name}: importing {module} ended with {error!r}") from error
    if not callable(found):
        raise SystemExit(f"--reward {name}: is {found!r:.80}, no function of (response, reference, think)")
    return found


def _import_module(module: str) -> types.ModuleType:
    """Import a user's module: from the current folder, else as Python does.

    One in the current folder becomes a member of the package :data:`USER`. It is then found whatever other module has
    its name (report.py of this example, one of the standard library), and nobody else gets it for that other module.
    """
    here = os.getcwd()
    spec = PathFinder.find_spec(module.partition(".")[0], [here])
    if spec is not None and spec.origin is not None:  # a folder without __init__.py ranks last, as Python ranks it
        package = types.ModuleType(USER)
        package.__path__ = [here]
        sys.modules[USER] = package
        module = f"{USER}.{module}"
    if here not in sys.path:
        sys.path.append(here)  # for what the user's module imports from its own folder
    with _example_ranks_last():
        return importlib.import_module(module)


@contextmanager
def _example_ranks_last() -> Iterator[None]:
    """Search the example's folder, which is the first of ``sys.path`` because the script is in it, after all others."""
    before = list(sys.path)
    sys.path[:] = [*(path for path in before if path != EXAMPLE), EXAMPLE]
    try:
        yield
    finally:
        sys.path[:] = before
