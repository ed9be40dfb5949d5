"""What counts as a response's answer: a table of shapes that models write, each with the reason for its reading."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqa.evaluation.answers import extract_answer, find_tagged

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ANIMALS = ["a dog", "a cat", "a dog and a cat", "a horse"]
PEOPLE = ["Man", "Woman", "Child", "Robot"]
NOTES = ["G", "A#", "D", "E"]
LETTERS = ["A", "B", "C", "D"]
NUMBERS = ["four", "nine", "fourteen", "fourteen"]

# (response, choices, prediction, why)
CASES = [
    # ---- tags
    ("<answer>Woman</answer>", PEOPLE, "Woman", "the asked-for form"),
    ("I hear a voice. <answer> Woman </answer> Yes.", PEOPLE, "Woman", "text around the tags does not matter"),
    ("<answer>\nWoman\n</answer>", PEOPLE, "Woman", "an answer may cross lines; R1-AQA's pattern loses it"),
    ("<Answer>Woman</ANSWER>", PEOPLE, "Woman", "tags in any case"),
    ("< answer >Woman< / answer >", PEOPLE, "Woman", "tags with blanks, as some tokenizers leave them"),
    ("<answer>Man</answer> no: <answer>Woman</answer>", PEOPLE, "Man", "of several answers the first, as in training"),
    ("<answer> </answer> <answer>Woman</answer>", PEOPLE, "Woman", "an empty pair repeats the prompt's example"),
    ("<answer><answer>Woman</answer></answer>", PEOPLE, "Woman", "nested: the inner one holds the text"),
    ("<answer>Woman", PEOPLE, "Woman", "the closing tag was cut off"),
    ("<answer>Woman</ans", PEOPLE, "Woman", "cut off in the middle of the closing tag"),
    ("<answer>Woman<answer>", PEOPLE, "Woman", "a closing tag without its slash"),
    ("Woman</answer>", PEOPLE, "Woman", "the opening tag is missing"),
    ("<answer>4 < x", PEOPLE, "4 < x", "but not everything behind a < is a tag"),
    ("<answer></answer>", PEOPLE, "", "nothing was said"),
    ("", PEOPLE, "", "nothing was said"),
    ("<answer></answer> Woman", PEOPLE, "Woman", "empty tags, the answer behind them"),
    # ---- thinking
    ("<think>Man? No.</think><answer>Woman</answer>", PEOPLE, "Woman", "thinking is no answer"),
    ("<think>Not <answer>Man</answer>.</think>\n<answer>Woman</answer>", PEOPLE, "Woman", "tags quoted in thinking"),
    ("<think>A low voice.</think> Man", PEOPLE, "Man", "without tags, what follows the thinking"),
    ("<think>So <answer>Man</answer></think>", PEOPLE, "Man", "an answer only in the thinking is better than none"),
    ("<think>A low voice <answer>Man</answer>", PEOPLE, "Man", "thinking that never ends"),
    # ---- no tags
    ("Woman", PEOPLE, "Woman", "the whole response is the answer"),
    (" woman.\n", PEOPLE, "Woman", "in the choice's own spelling"),
    ("It is a woman speaking.", PEOPLE, "It is a woman speaking.", "a sentence is left to the official rule"),
    ("Man or Woman", PEOPLE, "Man or Woman", "two choices are no answer; nothing is picked"),
    ("I cannot tell.", PEOPLE, "I cannot tell.", "as R1-AQA: the stripped response"),
    ("The pitch is high.\nAnswer: Woman", PEOPLE, "Woman", "the line that says it is the answer"),
    ("Man\nWoman", PEOPLE, "Man\nWoman", "lines that name different choices are no answer"),
    ("A. Man\nB. Woman\nThe answer is B.", PEOPLE, "Woman", "the options repeated, then an answer"),
    ("Woman\nThe pitch is high.", PEOPLE, "Woman", "an answer and its reason"),
    # ---- letters
    ("<answer>B</answer>", PEOPLE, "Woman", "the letter of a choice; the official rule would score the letter"),
    ("(B)", PEOPLE, "Woman", "the same in brackets"),
    ("B.", PEOPLE, "Woman", "the same with a stop"),
    ("b)", PEOPLE, "Woman", "the same, lower case"),
    ("<answer>(B) Woman</answer>", PEOPLE, "Woman", "letter and text; b is no word of the choice"),
    ("2. Woman", PEOPLE, "Woman", "a numbered list"),
    ("(A) Woman", PEOPLE, "Woman", "the prompt shows no letters: a text outranks a letter that contradicts it"),
    ("Option B", PEOPLE, "Woman", "named as an option"),
    ("The correct answer is (B).", PEOPLE, "Woman", "in a sentence that announces it"),
    ("B) Woman, as the pitch is high", PEOPLE, "Woman", "letter, its text, and a reason"),
    ("B) the second voice", PEOPLE, "B) the second voice", "a letter with another text: not guessed"),
    ("F", PEOPLE, "F", "there is no sixth choice"),
    ("2", PEOPLE, "2", "a number may be an answer itself, so it is no label"),
    ("A dog", ANIMALS, "a dog", "an article is no letter"),
    ("a", ANIMALS, "a dog", "but a lone one is"),
    ("E", NOTES, "E", "where letters are answers they are not labels"),
    ("C", NOTES, "C", "and a wrong note is a wrong answer, not the third choice"),
    ("A#.", NOTES, "A#", "a sharp is no punctuation"),
    ("<answer>D</answer>", LETTERS, "D", "choices that are letters"),
    # ---- markup
    ("<answer>**Woman**</answer>", PEOPLE, "Woman", "bold"),
    ("_Woman_", PEOPLE, "Woman", "emphasis; to the official rule _Woman_ is another word"),
    ("`Woman`", PEOPLE, "Woman", "code"),
    ("<answer>'Woman'</answer>", PEOPLE, "Woman", "quoted, as the prompt's list has it"),
    ("['Woman']", PEOPLE, "Woman", "as a Python list"),
    ("\\boxed{Woman}", PEOPLE, "Woman", "boxed"),
    ("\\boxed{\\text{Woman}}", PEOPLE, "Woman", "boxed text"),
    ("- **Answer:** Woman", PEOPLE, "- **Answer:** Woman", "unusual enough; the official rule finds it right"),
    ("**The answer is B**", PEOPLE, "Woman", "bold around an announcement"),
    # ---- choices that contain each other, and equal ones
    ("<answer>a dog and a cat</answer>", ANIMALS, "a dog and a cat", "the longer choice, not the one within"),
    ("a dog and a horse", ANIMALS, "a dog and a horse", "not the one it begins with"),
    ("Fourteen", NUMBERS, "fourteen", "of equal choices either"),
]
SOUNDS = ["(A) engine", "(B) beep", "(C) rain", "(D) heavy rain"]
HEADS = ["A. ", "A) ", "A: ", "a. ", "[a] ", "A - ", "**A.** ", "`A)` ", "1) ", "1. ", "(1) "]
HEADS += ["\uff08A\uff09", "A\uff0e", "A\u3001", "\u3010A\u3011"]  # full width
SHUFFLED = ["(C) engine", "(A) beep", "(B) rain"]
AUTHORS = ["A. Smith", "B. Jones", "J. Smith"]
DECIMALS = ["1.5", "2.7", "3.1"]
RATIOS = ["1:2", "2:3", "3:5"]
KEYS = ["C major", "A minor", "B minor", "E flat"]
NUMBERED = ["1) 2", "2) 1", "3) 7"]
# The choices themselves hold letters or numbers.
LABELLED = [
    ("<answer>beep</answer>", SOUNDS, "(B) beep", "the text alone"),
    ("Beep.", SOUNDS, "(B) beep", "in any case, with a stop"),
    ("<answer>B</answer>", SOUNDS, "(B) beep", "the letter alone"),
    ("**B**...", SOUNDS, "(B) beep", "the same in bold, with dots"),
    ("\uff08B\uff09", SOUNDS, "(B) beep", "the same in full-width brackets"),
    ("\uff22", SOUNDS, "(B) beep", "the same as a full-width letter"),
    ("(B) beep", SOUNDS, "(B) beep", "as printed"),
    ("B - beep", SOUNDS, "(B) beep", "a dash"),
    ("**B.** beep", SOUNDS, "(B) beep", "a bold letter before a plain text"),
    ("\u3010B\u3011beep", SOUNDS, "(B) beep", "lenticular brackets"),
    ("B) beep, as it is short", SOUNDS, "(B) beep", "letter, its text, and a reason"),
    ("The answer is: beep", SOUNDS, "(B) beep", "in a sentence that announces it"),
    ("It is rain.", SOUNDS, "(C) rain", "the official rule would find it right if the choices had no letters"),
    ("It is heavy rain.", SOUNDS, "(D) heavy rain", "the longer choice, not the one within"),
    ("(A) beep", SOUNDS, "(A) beep", "the prompt shows the letters, so letter and text contradict each other"),
    ("A, because of the beep", SOUNDS, "A, because of the beep", "the same in a sentence: not guessed"),
    ("beep or rain", SOUNDS, "beep or rain", "two choices are no answer"),
    ("E", SOUNDS, "E", "there is no fifth choice"),
    ("a beeping", SOUNDS, "a beeping", "a word that begins with a choice is another word"),
    ("A", SHUFFLED, "(A) beep", "the letter that is shown, not the place in the list"),
    ("rain", SHUFFLED, "(B) rain", "the text alone"),
    ("A dog", ["A dog", "A cat"], "A dog", "an article is no label"),
    ("dog", ["A dog", "A cat"], "dog", "nor is it left out"),
    ("Smith", AUTHORS, "Smith", "initials out of order are no labels"),
    ("7", DECIMALS, "7", "the digits before a point are no labels"),
    ("3", RATIOS, "3", "nor those before a colon"),
    ("2", NUMBERED, "2", "the text of one choice and the number of another: not guessed"),
    ("(C) 3) 7", NUMBERED, "3) 7", "a letter where numbers are shown"),
    ("7", NUMBERED, "3) 7", "the text of one, and no number"),
    ("beep", ["(A) beep", "(B) beep"], "beep", "two choices with that text"),
    # letters as words
    ("B", KEYS, "B", "the letter of one choice, and the place of another: not guessed"),
    ("The answer is **a**.", KEYS, "The answer is **a**.", "no article, but a key"),
    ("(B)", KEYS, "A minor", "in brackets it is a place"),
    ("D", KEYS, "E flat", "no choice's word, so a place"),
    ("B) A minor", KEYS, "A minor", "the text counts"),
    ("A", ["a minor", "A flat"], "A", "keys in either case"),
    ("A", ["A Dorian", "E Dorian"], "A", "a mode"),
    ("A", ["Plan B", "Plan A"], "A", "a name"),
    ("A", ["A flat tyre", "A natural, deep voice"], "A flat tyre", "articles"),
    ("B", ["it's a B-side", "R&B"], "B", "of a word with a hyphen"),
    ("B", ["Rock", "R&B"], "R&B", "but not of an abbreviation"),
    ("B", ["1) C major", "2) A minor", "3) B minor"], "B", "the same where numbers are shown"),
    ("B", ["(A) B minor", "(B) A minor"], "(B) A minor", "a label that is shown"),
    *(
        (said, [f"{head}engine", head.translate(str.maketrans("Aa1", "Bb2")) + "beep"], f"{head}engine", "label")
        for head in HEADS
        for said in ("engine", "Engine.", "(1)" if "1" in head else "(A)", f"{head}engine")
    ),
]


@pytest.mark.parametrize(
    ("response", "choices", "expected", "why"), CASES + LABELLED, ids=[f"{c[3]}: {c[0]!r}" for c in CASES + LABELLED]
)
def test_table(response, choices, expected, why):
    answer = extract_answer(response, choices)
    assert answer.text == expected, why
    assert answer.is_choice == (expected in choices)


def test_tagged():
    assert extract_answer("<answer>B", PEOPLE).tagged
    assert not extract_answer("Woman", PEOPLE).tagged
    assert find_tagged("no tags") is None


@pytest.mark.parametrize("name", ["mmau/mmau-test-mini.json", "mmar/MMAR-meta.jsonl"])
def test_every_real_choice_is_itself(name):
    """In the asked-for form, bare, bold and with its letter, each choice of the real benchmarks scores as itself."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    for row in rows:
        choices = row["choices"]
        for letter, choice in zip("ABCDEFGH", choices, strict=False):
            for form in ("<answer>{0}</answer>", "{0}", "**{0}**", "<answer>({1}) {0}</answer>", "{1}. {0}"):
                said = extract_answer(form.format(choice, letter), choices).text
                if choice.strip():
                    assert said.casefold().split() == choice.casefold().split(), (form, choice, said)
            said = extract_answer(f"<answer>({letter})</answer>", choices).text
            if not any(len(c.strip()) == 1 and c.strip().isalpha() for c in choices) and choice.strip():
                assert said.casefold().split() == choice.casefold().split(), (letter, choice, said)


PIECES = [*"<>/AB.()*_\n'[]: ", "Man", "Woman", "<answer>", "</answer>", "</think>", "answer is ", "think"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_any_text_has_a_prediction(response):
    answer = extract_answer(response, PEOPLE)
    assert answer.text == answer.text.strip()
    assert answer.is_choice == (answer.text in PEOPLE)
    if not answer.is_choice:  # nothing is invented: it is one piece of the response, but for tags in it
        said, written = (re.sub(r"</?(answer|think)>|\s", "", text) for text in (answer.text, response))
        assert said in written
