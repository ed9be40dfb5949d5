"""Find the prediction in a response: the answer between its tags, and the choice that it means.

R1-AQA takes the text between the first pair of answer tags on one line, or the whole response. The benchmarks' rule
then compares words: "(B)" is wrong, and so is an answer with one word of another choice. Here the tags may have any
shape that models write, and an answer that names exactly one choice, by its text or by its letter, becomes that
choice's own text. Any other answer stays as it is, for the official rule to judge; similarity is never used to guess.
Tested by the table in ``tests/unit/test_eval_answers.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aqa.evaluation.scoring import is_right

_TAG = re.compile(r"<\s{0,3}(/?)\s{0,3}answer\s{0,3}>", re.IGNORECASE)
_TORN_TAG = re.compile(
    r"<\s{0,3}/?\s{0,3}(?:answer|answe|answ|ans|an|a)?\s{0,3}$", re.IGNORECASE
)  # cut off by the token limit
_THINK_END = re.compile(r"</\s{0,3}think\s{0,3}>", re.IGNORECASE)
_THINK_TAG = re.compile(r"</?\s{0,3}think\s{0,3}>", re.IGNORECASE)
# "The correct answer is: ", "Answer: ", "So, option "
_LEAD_IN = re.compile(
    r"^(?:[\w',]{1,20}\s{1,3}){0,5}?(?:answer|option|choice)\b\s{0,3}(?:(?:is|would be)\b|[:=-])?[\s:]{0,3}(?=\S)",
    re.IGNORECASE,
)
# "(B)", "[b]", "B", and with a text behind: "(B) text", "B. text", "B) text", "B: text", "2. text"
_LABEL = re.compile(
    r"^(?:[(\[]\s?([A-Za-z]|\d{1,2})\s?[)\]][.:,]?|([A-Za-z]|\d{1,2})\s?[.):](?=\s|$)|([A-Za-z])$)\s{0,3}"
)
_WRAPPERS = (
    ("```", "```"),
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("_", "_"),
    ("`", "`"),
    ("$", "$"),
    ("\\boxed{", "}"),
    ("\\text{", "}"),
    ("\\(", "\\)"),
    ("[", "]"),
    ("(", ")"),
    ("'", "'"),
    ('"', '"'),
    ("\u2018", "\u2019"),
    ("\u201c", "\u201d"),
    ("<", ">"),
)
_BULLET = re.compile(r"^(?:[-*>•]|#{1,4})\s+")
_END = ".,;:!?。"

# No real answer needs more. Without these limits a megabyte of "- - - ..." or "answer is answer is ..." takes hours.
_MOST_LAYERS = 16
_MOST_LINES = 500


class Answer(NamedTuple):
    """What a response says."""

    text: str  # the prediction: a choice's own text, else the answer as the model wrote it, stripped
    tagged: bool  # it was found by answer tags, complete or not
    is_choice: bool  # it names one choice


def extract_answer(response: str, choices: Sequence[str]) -> Answer:
    """Find the prediction in a response without special tokens; its text is empty only if the response is."""
    # The thinking may quote the tags, so it is searched last; an answer there is better than none.
    parts = (_THINK_TAG.sub(" ", _THINK_END.split(response)[-1]), _THINK_TAG.sub(" ", response))
    for text in parts:
        tagged = find_tagged(text)
        if tagged is not None:
            choice = find_choice(tagged, choices)
            return Answer(tagged if choice is None else choice, True, choice is not None)
    for text in parts:
        bare = _TAG.sub(" ", text).strip()
        if bare:
            choice = find_choice(bare, choices)
            return Answer(bare if choice is None else choice, False, choice is not None)
    return Answer("", False, False)


def find_tagged(text: str) -> str | None:
    """The stripped text that answer tags mark, or None if they mark none.

    The first complete pair with text in it counts, as R1-AQA's first pair does; of nested opening tags the innermost
    counts. Without a pair: the text between two opening tags (a closing tag without its slash), after an opening tag
    (the token limit cut the response), or before a closing tag.
    """
    start, end = None, 0
    between, before = None, None
    for tag in _TAG.finditer(text):
        part = text[end if start is None else start : tag.start()].strip()
        if tag[1]:
            if start is not None and part:
                return part
            if start is None and part and before is None:
                before = part
            start = None
        else:
            if start is not None and part and between is None:
                between = part
            start = tag.end()
        end = tag.end()
    rest = None if start is None else _TORN_TAG.sub("", text[start:]).strip()
    return between or rest or before


def find_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a stripped answer names, in its own spelling; None if it names none, or several."""
    choice = _match(text, choices)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if choice is not None or len(lines) < 2:
        return choice
    for line in reversed(lines[-_MOST_LINES:]):  # "... Answer: dog" outranks the reasoning around it
        if _LEAD_IN.match(_peel_marks(line)):
            choice = _match(line, choices)
            if choice is not None:
                return choice
    named = {_normal(c): c for c in (_match(lines[0], choices), _match(lines[-1], choices)) if c is not None}
    return next(iter(named.values())) if len(named) == 1 else None


def _match(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text names as a whole, by its text or else by its letter."""
    by_text = {_normal(choice): choice for choice in reversed(choices)}  # the first of equal choices
    forms = list(_peelings(text))
    for form in forms:
        if _normal(form) in by_text:
            return by_text[_normal(form)]
    # Where letters are choices (keys, chords), another letter is a wrong answer and not the label of a choice.
    letters_are_answers = any(len(choice.strip()) == 1 and choice.strip().isalpha() for choice in choices)
    for form in forms:
        label = _LABEL.match(form)
        if label is None:
            continue
        rest = form[label.end() :]
        for part in _peelings(rest):
            if _normal(part) in by_text:  # the prompt shows no letters, so the text outranks a letter it contradicts
                return by_text[_normal(part)]
        letter = (label[1] or label[2] or label[3]).upper()
        index = ord(letter[0]) - ord("A")
        if letter.isdigit() or letters_are_answers or index >= len(choices):
            continue
        # a letter followed by text counts only if the text means the same choice
        if not rest or ("\n" not in rest and is_right(rest, choices[index], choices)):
            return choices[index]
    return None


def _peelings(text: str) -> Iterator[str]:
    """The text, then the text with one wrapping after another removed: marks, punctuation, "the answer is"."""
    previous = None
    for _ in range(_MOST_LAYERS):
        if not text or text == previous:
            return
        yield text
        previous, text = text, _peel(text)


def _peel(text: str) -> str:
    peeled = _peel_marks(text)
    if peeled != text:
        return peeled
    peeled = text.rstrip(_END).rstrip()
    if peeled != text:
        return peeled
    return _LEAD_IN.sub("", text).strip()


def _peel_marks(text: str) -> str:
    """Remove one layer of markdown, quotes or brackets."""
    for left, right in _WRAPPERS:
        inner = text[len(left) : len(text) - len(right)]
        if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right) and left not in inner:
            return inner.strip()
    return _BULLET.sub("", text).strip()


def _normal(text: str) -> str:
    """A text without differences of case, spacing and apostrophes."""
    return " ".join(text.replace("\u2019", "'").casefold().split())
