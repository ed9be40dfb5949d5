"""Which of a question's choices an answer names: by its text, or by the letter or number in front of it.

The benchmarks' rule compares words, and R1-AQA's compares strings: for both "(B)" is no answer, and neither is "beep"
where the choice is "(B) beep". Here an answer that names exactly one choice becomes that choice. Any other answer stays
as it is, for the rule to judge; similarity is never used to guess.
Tested by the tables in ``tests/unit/test_eval_answers.py``.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# "The correct answer is: ", "Answer: ", "So, option "
_LEAD_IN = re.compile(
    r"^(?:[\w',]{1,20}\s{1,3}){0,5}?(?:answer|option|choice)\b\s{0,3}(?:(?:is|would be)\b|[:=-])?[\s:]{0,3}(?=\S)",
    re.IGNORECASE,
)
_MARKS = "[*_`]{0,3}"  # "**B.** text"
# "(B)", "[b]", "B", "2", and with a text behind: "(B) text", "B. text", "B) text", "B: text", "B - text", "2. text"
_LABEL = re.compile(
    rf"^{_MARKS}(?:[(\[]\s?([A-Za-z]|\d{{1,2}})\s?[)\]][.:,]?|([A-Za-z]|\d{{1,2}})(?:\s?[.):]|\s[-\u2013\u2014])"
    rf"(?=\s|{_MARKS}(?:\s|$))|([A-Za-z]|\d{{1,2}})$){_MARKS}\s{{0,3}}"
)
# the same at the head of a choice, which has a text behind it; ")" needs no space
_CHOICE_LABEL = re.compile(
    rf"^{_MARKS}(?:[(\[]\s?([A-Za-z]|\d{{1,2}})\s?[)\]][.:,]?|([A-Za-z]|\d{{1,2}})"
    rf"(?:\s?\)|\s?[.:](?={_MARKS}\s)|\s[-\u2013\u2014](?=\s))){_MARKS}\s{{0,3}}(?=\S)"
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
# A letter that a choice uses as a word: a key, "Plan B", an initial. "it's", "R&B" and the article "a" have none.
_WORD = re.compile(r"(?<![\w'\u2019&])[A-Za-z](?![\w'\u2019&])")
_ARTICLE = re.compile(r"\b[Aa]\s(?!(?:(?:flat|sharp|natural)\s)?(?:major|minor)\b|(?:flat|sharp|natural)$)(?=[a-z])")
_BULLET = re.compile(r"^(?:[-*>•]|#{1,4})\s+")
_END = ".,;:!?。…"
# Full-width forms as their ASCII ones; those behind a label get the space that ASCII writes there.
_WIDE = {0xFF01 + i: chr(0x21 + i) for i in range(94)} | str.maketrans(
    {"【": "[", "】": "] ", "\uff09": ") ", "\uff3d": "] ", "\uff0e": ". ", "\uff1a": ": ", "、": ". ", "\u3000": " "}
)

# No real answer needs more. Without these limits a megabyte of "- - - ..." or "answer is answer is ..." takes hours.
_MOST_LAYERS = 16
_MOST_LINES = 500


def words(text: str) -> set[str]:
    """The words that the benchmarks' rule compares."""
    return set(re.findall(r"\w+", text.lower()))


def is_right(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """The benchmarks' official rule: whether a prediction means the answer, the right choice's text."""
    said, wanted = words(prediction), words(answer)
    forbidden = set().union(*map(words, choices)) - wanted
    return bool(said) and wanted <= said and not said & forbidden


def rotated(choices: Sequence[str], shift: int) -> list[str]:
    """The choices from number ``shift`` on, then those before it; labels that all carry ("(A) dog") stay in place."""
    places = [(place + shift) % len(choices) for place in range(len(choices))]
    options = _options(choices)
    if not options.labelled or shift == 0:
        return [choices[i] for i in places]
    plain = [choice.translate(_WIDE).strip() for choice in choices]
    labels = [text.removesuffix(bare) for text, bare in zip(plain, options.bare, strict=True)]
    return [label + options.bare[i] for label, i in zip(labels, places, strict=True)]


class _Options(NamedTuple):
    """A question's choices, ready to be looked up."""

    own: Sequence[str]
    bare: list[str]  # without their labels, where ``labelled``
    labelled: bool  # all choices carry a letter or number, which the prompt shows
    by_text: dict[str, str]  # choice by its normalised text, with and without label
    by_label: dict[str, str | None]  # choice by its letter, upper case, or its number; None: also another one's text
    unclear: set[str]  # letters that no choice carries and that some choice has as a word: "B" may mean "B minor"


def find_choice(text: str, choices: Sequence[str], sentences: bool = True) -> str | None:
    """The choice that a stripped answer names, in its own spelling; None if it names none, or several.

    :param sentences: An answer may say more than the choice. Without, it is a text, a label, or a label and its text:
        a reward that pays for "not the cat" or "The wrong answer is: cat" teaches to write it.
    """
    options = _options(choices)
    text = text.translate(_WIDE).strip()
    choice = _match(text, options, sentences)
    if not sentences:
        return choice
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if choice is None and len(lines) > 1:
        choice = _match_lines(lines[-_MOST_LINES:], lines[0], options)
    if choice is None and options.labelled:
        choice = _match_words(text, options)
    return choice


def _options(choices: Sequence[str]) -> _Options:
    plain = [choice.translate(_WIDE).strip() for choice in choices]
    by_text = {_normal(text): own for text, own in zip(reversed(plain), reversed(choices), strict=True)}
    by_letter: dict[str, str | None] = {chr(ord("A") + i): own for i, own in enumerate(choices[:26])}
    found = [_CHOICE_LABEL.match(text) for text in plain]
    if all(found) and len(found) > 1:
        labels = [(match[1] or match[2]).upper() for match in found]
        bare = [text[match.end() :] for text, match in zip(plain, found, strict=True)]
        series = {str(i + 1) if labels[0].isdigit() else chr(ord("A") + i) for i in range(len(labels))}
        if set(labels) == series and len(set(map(_normal, bare))) == len(bare):
            by_label = by_letter | dict(zip(labels, choices, strict=True))
            by_bare = {_normal(text): own for text, own in zip(bare, choices, strict=True)}
            for both in {text for text in by_bare if text.upper() in by_label}:  # "(A) B": is B a text or a label?
                del by_bare[both]
                by_label[both.upper()] = None
            return _Options(choices, bare, True, by_bare | by_text, by_label, _letters(bare) - set(labels))
    # Where letters are choices (keys, chords), another letter is a wrong answer and not the label of a choice.
    if any(len(text) == 1 and text.isalpha() for text in plain):
        return _Options(choices, plain, False, by_text, {}, set())
    return _Options(choices, plain, False, by_text, by_letter, _letters(plain))


def _letters(texts: Sequence[str]) -> set[str]:
    return {letter.upper() for text in texts for letter in _WORD.findall(_ARTICLE.sub("", text))}


def _match(text: str, options: _Options, sentences: bool = True) -> str | None:
    """The choice that a text names as a whole, by its text or else by its label."""
    forms = list(_peelings(text, sentences))
    for form in forms:
        if _normal(form) in options.by_text:
            return options.by_text[_normal(form)]
    for form in forms:
        label = _LABEL.match(form)
        if label is None:
            continue
        rest = form[label.end() :]
        name = (label[1] or label[2] or label[3]).upper()
        choice = options.by_label.get(name)
        for part in _peelings(rest, sentences):
            if (named := options.by_text.get(_normal(part))) is not None:
                # a prompt without labels leaves the text to count; one that shows them is contradicted
                return named if named == choice or (sentences and not options.labelled) else None
        if choice is None:
            continue
        if not rest:
            return choice if label[1] or name not in options.unclear else None
        # a label followed by text counts only if the text means the same choice
        if sentences and "\n" not in rest and is_right(rest, options.bare[options.own.index(choice)], options.bare):
            return choice
    return None


def _match_lines(lines: Sequence[str], first: str, options: _Options) -> str | None:
    """The choice that the last line with "answer is" names ("... Answer: dog" outranks the reasoning around it), else
    the one that the first or the last line names."""
    for line in reversed(lines):
        if _LEAD_IN.match(_peel_marks(line)):
            choice = _match(line, options)
            if choice is not None:
                return choice
    named = {_normal(c): c for c in (_match(first, options), _match(lines[-1], options)) if c is not None}
    return next(iter(named.values())) if len(named) == 1 else None


def _match_words(text: str, options: _Options) -> str | None:
    """The choice that the benchmarks' rule would find in a sentence if the choices had no labels; None where the text
    also has something that may be a label."""
    if any(label in options.by_label for label in re.findall(r"\b(?:[A-Z]|\d{1,2})\b", text)):
        return None
    named = [own for own, bare in zip(options.own, options.bare, strict=True) if is_right(text, bare, options.bare)]
    return named[0] if len(named) == 1 else None


def _peelings(text: str, sentences: bool) -> Iterator[str]:
    """The text, then the text with one wrapping after another removed: marks, punctuation, and, unless ``sentences``
    is false, "the answer is"."""
    previous = None
    for _ in range(_MOST_LAYERS):
        if not text or text == previous:
            return
        yield text
        previous, text = text, _peel(text, sentences)


def _peel(text: str, sentences: bool) -> str:
    peeled = _peel_marks(text)
    if peeled != text:
        return peeled
    peeled = text.rstrip(_END).rstrip()
    if peeled != text:
        return peeled
    return _LEAD_IN.sub("", text).strip() if sentences else text


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
