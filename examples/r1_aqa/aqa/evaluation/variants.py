"""Ask each question again: with its options in other orders (``--option_orders``) and in silence (``--silent_audio``).

Order k begins with option k and goes round, so that over as many orders as options the right one takes every place.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from aqa.data.prompts import render_prompt
from aqa.evaluation.answers import extract_answer
from aqa.evaluation.items import EvalError, Item
from aqa.rewards.choices import rotated


def ask_again(items: Sequence[Item], orders: int, in_silence: bool, think: bool, stride: int) -> list[Item]:
    """The further items to ask.

    Their indices say what they are, so that an interrupted run can be continued with other orders: ``k * stride`` more
    than the question's own in order k, ``-1 - index`` in silence.

    :param orders: How many orders, the file's own among them.
    :param stride: More than any index of ``items``.
    :raises EvalError: if no question has so many options.
    """
    most = max(len(item.row["choices"]) for item in items)
    if orders > most:
        raise EvalError(f"--option_orders {orders}: the questions have at most {most} options, and so many orders")
    further = [
        dataclasses.replace(
            item,
            index=item.index + k * stride,
            prompt=render_prompt(item.row["question"], rotated(item.row["choices"], k), think),
        )
        for k in range(1, orders)
        for item in items
        if k < len(item.row["choices"])  # more rotations than choices would ask an order twice
    ]
    silent = [dataclasses.replace(item, index=-1 - item.index, silent=True) for item in items if in_silence]
    return further + silent


def own_index(index: int, stride: int) -> int:
    """The index of the question that an item of :func:`ask_again` asks again."""
    return index % stride if index >= 0 else -1 - index


def further_answers(
    item: Item, responses: Mapping[int, str], orders: int, in_silence: bool, stride: int
) -> dict[str, Any]:
    """Fields of the result row: ``option_orders``, which holds for each order the numbers of the options as they were
    shown, and the prediction in the file's own spelling; and ``in_silence``.

    :param responses: By index, see :func:`ask_again`; without audio there are none.
    """
    fields: dict[str, Any] = {}
    choices = item.row["choices"]
    if orders > 1:
        fields["option_orders"] = []
        for k in range(orders):
            shift = k % len(choices)
            shown = rotated(choices, shift)
            raw = responses.get(item.index + shift * stride, "")
            answer = extract_answer(raw, shown)
            order = [(place + shift) % len(choices) for place in range(len(choices))]
            text = choices[order[shown.index(answer.text)]] if answer.is_choice else answer.text
            fields["option_orders"].append({"order": order, "prediction": text, "raw_output": raw})
    if in_silence:
        raw = responses.get(-1 - item.index, "")
        fields["in_silence"] = {"prediction": extract_answer(raw, choices).text, "raw_output": raw}
    return fields


def describe_orders(right: Sequence[Sequence[bool]], said: Sequence[Sequence[str]]) -> dict[str, Any]:
    """How much the order of the options matters.

    :param right: The verdicts of each order, one for each question.
    :param said: The predictions, likewise.
    :return: The accuracy of each order, their mean, least, greatest and standard deviation (fractions); and the share
        of questions that have the same prediction in every order.
    """
    accuracies = [sum(verdicts) / len(verdicts) for verdicts in right]
    same = [len(set(predictions)) == 1 for predictions in zip(*said, strict=True)]
    return {
        "accuracies": accuracies,
        "mean": statistics.mean(accuracies),
        "least": min(accuracies),
        "greatest": max(accuracies),
        "std": statistics.stdev(accuracies),
        "agreement": sum(same) / len(same),
    }
