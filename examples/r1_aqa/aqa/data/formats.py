"""How the data sets name the fields of a row. ``avqa.py`` and ``eval_mmau.py`` read each of these formats.

A format is told by the fields of a file's rows, never by the file's name.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Format(NamedTuple):
    """The fields of one format.

    :param title: Name in messages, and of the data set where a row does not say which it is from.
    :param choices: One field that holds a list, or one field for each choice.
    :param audio: Field with the path of the recording.
    :param dataset: Field with the name of the data set.
    :param kind: Field with the kind of question, by which results are broken down.
    :param by_text: The answer is the text of the right choice; else it is the choice's number.
    """

    title: str
    question: str
    choices: tuple[str, ...]
    answer: str
    audio: str
    dataset: str
    kind: str
    by_text: bool = True

    def choices_of(self, row: dict[str, Any]) -> Any:
        """The choices of a row, unchecked; None where a field of theirs is absent or null. Of four fields, the last
        two may be empty."""
        found = [row.get(name) for name in self.choices]
        if len(found) == 1:
            return found[0]
        while len(found) > 2 and found[-1] in (None, ""):
            found.pop()
        return None if None in found else found

    def as_question(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as one of MMAU's questions, unchecked; fields that MMAU does not have keep their names."""
        own = ("id", self.question, *self.choices, self.answer, self.audio, "task")  # MMAU's name for the type
        fields = map(row.get, ("id", self.audio, self.question, self.answer, self.kind))
        further = {name: value for name, value in row.items() if name not in own}
        return further | make_question(*fields, self.choices_of(row), row.get(self.dataset) or self.title)


def make_question(
    identity: Any, audio: Any, question: Any, answer: Any, kind: str | None, choices: Any, dataset: str
) -> dict[str, Any]:
    """A question as ``eval_mmau.py`` reads it: in MMAU's format, but with its kind under a name of its own.

    :param kind: The data set's name stands for one that is missing.
    """
    own = {"id": identity, "audio_id": audio, "question": question, "choices": choices, "answer": answer}
    return own | {"dataset": dataset, "question_type": kind or dataset}


_OWN = ("own questions", "question_text", ("multi_choice",), "answer", "audio_path")
R1_AQA = Format(*_OWN, "dataset_name", "question_type", by_text=False)
DCASE = Format(*_OWN, "source_dataset", "question_type")
AUDIO_MCQ = Format("AudioMCQ", "question", ("choices",), "answer", "audio_path", "source_dataset", "question_type")
MMAU = Format("MMAU", "question", ("choices",), "answer", "audio_id", "dataset", "task")
MMAR = Format("MMAR", "question", ("choices",), "answer", "audio_path", "source", "modality")
MMAU_PRO = Format("MMAU-Pro", "question", ("choices",), "answer", "audio_path", "dataset", "category")
MMSU = Format(
    "MMSU",
    "question",
    ("choice_a", "choice_b", "choice_c", "choice_d"),
    "answer_gt",
    "audio_path",
    "task_name",
    "category",
)


def format_of(values: Iterable[object]) -> Format:
    """The format of a file: that of its first row which has a question, choices and a recording as a format names them.

    R1-AQA's rows and DCASE's, also those of one's own, have the same fields. They are DCASE's where more answers are
    texts of choices than are numbers, or where no answer is either. A text of digits could be either, so a file of
    only such answers is R1-AQA's, whose reader refuses them.

    :param values: The rows.
    :return: The format; R1-AQA's where no row tells.
    """
    rows = [value for value in values if isinstance(value, dict)]
    for row in rows:
        if R1_AQA.question in row and R1_AQA.choices[0] in row:
            pairs = [(row.get(R1_AQA.answer), row.get(R1_AQA.choices[0])) for row in rows]
            numbers = sum(isinstance(answer, (int, float)) for answer, _ in pairs)
            digits = [isinstance(answer, str) and answer.strip().isdecimal() for answer, _ in pairs]
            texts = sum(
                isinstance(answer, str) and isinstance(choices, list) and answer in choices and not is_digits
                for (answer, choices), is_digits in zip(pairs, digits, strict=True)
            )
            return DCASE if texts > numbers or not (numbers or any(digits)) else R1_AQA
        for found in (MMSU, MMAU, AUDIO_MCQ):
            if {found.question, found.choices[0], found.audio} <= row.keys():
                return found
    return R1_AQA
