"""Rewards and answer extraction on hostile responses: total, bounded, not to be cheated, and R1-AQA's to the letter.

The default run scores a sample, ``make test-faults`` 100,000 hostile and 50,000 ordinary responses.

What "a hack" is. A response says one thing: the stripped text of its first one-line ``<answer>``, or of its whole
turn. A response cheats if it earns more than that text earns when it is said plainly. With a reference that holds
nothing that ``math_verify`` reads (AVQA's choices), this must hold for every response:

- what stands behind the first end of a turn changes nothing;
- its rewards are not above those of the literal rule (``literal_rule.py``) for its first turn;
- its accuracy is not above that of ``<answer>what it says</answer>``, and its total not above that form's total;
- of the question's choices at most one is rewarded: nobody can hedge.

With other references R1-AQA's rule itself is more generous. :data:`GENEROSITIES` names these cases with their values.
"""

import multiprocessing
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import literal_rule
import pytest
import torch

from aqa.evaluation.answers import extract_answer
from aqa.rewards import matching
from aqa.rewards import r1_aqa as rewards
from aqa.rewards.matching import MathChecker, is_endless, may_hold_math

MEGABYTE = 1 << 20

END, PAD = "<|im_end|>", "<|endoftext|>"
HEADER = "<|im_start|>assistant\n"
LABELS = (rewards.PLAIN_LABEL, rewards.THINK_LABEL)

# Each row is a question's choices; any may be the reference. The first kinds are AVQA's.
QUESTIONS = {
    "words": ["dog", "cat", "a dog and a cat", "horse"],
    "actions": ["Playing the guitar", "Singing", "Playing the piano", "Clapping hands"],
    "yes or no": ["yes", "no"],
    "capitals": ["Man", "Woman", "Child", "man"],
    "commas": ["piano, guitar", "guitar, piano", "piano", "drums, bass (loud), flute"],
    "quotes": ["It's a 'bird'", 'a "bird"', "a bird's cry", "don't know"],
    "bare numbers": ["4", "5", "14", "4.0"],
    "numbers and units": ["4 dogs", "5 dogs", "12:30", "3.5 kHz"],
    "letters": ["A", "B", "C", "D"],
    "signs": ["A#", "D♭", "<unk>", "answer"],
    "unicode": ["鸟叫", "Straße", "café", "шум ветра"],
    "right to left": ["כלב", "קול", "موسيقى", "صوت"],
    "long": ["the sound of rain on a roof " * 8, "the sound of wind in a tree " * 8],
    "brackets": ["(a dog)", "[a dog]", "{a dog}", "a dog"],
    "paths": ["C:\\new\\frac", "\\alpha", "a/b", "x_1"],
}
# ... and these hold what math_verify reads. They are drawn once in MATH_SHARE: AVQA hardly has any.
MATH_QUESTIONS = {
    "latex": ["$\\frac{1}{2}$", "$\\frac{2}{3}$", "$x + 1$", "\\boxed{7}"],
    "number in a sentence": ["about 4 dogs", "about 5 cats", "more than 12", "in 1998"],
    "sets": ["$\\{1, 2, 3\\}$", "$[0, 1)$", "$(3, 4)$", "$x = 2$"],
}
MATH_SHARE = 16

MATHS = [  # expressions of every kind that math_verify compares in its own way
    *["4", "-4.0", "1/2", "50%", "0.5", "1,000", "4e3", "\\frac{1}{2}", "\\frac12", "x+1", "x=2", "2=x", "x<2"],
    *["\\{1,2,3\\}", "\\{1,2\\} \\cup \\{3\\}", "[0,1)", "(-\\infty,\\infty)", "(3,4)", "\\emptyset", "\\pi", "i"],
    *["\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "x^2+2x+1=0", "x=1, y=2", "\\sqrt{4}", "\\sin x", "\\text{dog}"],
    *["1 \\le x < 2", "x \\in \\{1,2\\}", "\\infty", "\\frac{1}{0}", "0^0", "4\\text{ dogs}", "4^\\circ", "\\$4"],
    *["\\log_2 8", "|x|", "\\binom{4}{2}", "\\overline{AB}", "a \\cdot b", "\\pm 2", "10^{3}", "4!"],
]
TAGS = ["<answer>", "</answer>", "<think>", "</think>"]
TAG_BITS = ["<", ">", "</", "<answer", "answer>", "<Answer>", "< answer >", "<answer/>", "</answer >", "&lt;answer&gt;"]
SPECIAL = [
    *[END, PAD, "<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>user\n", HEADER],
    *["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>", "<|0.00|>", "<s>", "</s>", "[INST]"],
    *["<|im_end", "<|im_end|", "im_end|>", "<|IM_END|>", "<|im_end |>", "<||im_end|>", "<|im_<|im_end|>end|>"],
]
INVISIBLE = list("\u200b\u200c\u200d\u2060\ufeff\u00ad\u202e\u202d\u2066\u2069\u180e")
CONTROLS = [*map(chr, range(32)), "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\ufffe", "\uffff"]
ODD = [*"\ud800\udfff\ud83d٣½４İß\U0010ffff", "👩‍👩‍👧‍👦", "e\u0301" * 9, "a" + "\u0335" * 60, "𝐝𝐨𝐠", "ﷺ"]


class Sample(NamedTuple):
    """One response to score.

    :param family: What kind of hostility it is.
    :param response: What the model generated, without its prompt.
    """

    family: str
    choices: list[str]
    gold: str
    response: str
    label: str

    @property
    def prompt(self) -> str:
        return prompt_of(self.choices, self.label == rewards.THINK_LABEL)

    @property
    def think(self) -> bool:
        return self.label == rewards.THINK_LABEL


def prompt_of(choices: list[str], think: bool) -> str:
    """A decoded prompt as the recipe renders it."""
    asked = "Output the final answer in <answer> </answer>."
    if think:
        asked = "Output the thinking process in <think> </think> and final answer in <answer> </answer>."
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Audio 1: <|audio_bos|><|AUDIO|><|AUDIO|><|audio_eos|>\nWhat is heard? Please choose the answer from the "
        f"following options: {choices}. {asked}<|im_end|>\n{HEADER}"
    )


# ---- the families; each takes (random numbers, choices, reference, a wrong choice) and returns a response


def some(rng: random.Random, pieces: list[str], most: int) -> str:
    return "".join(rng.choices(pieces, k=rng.randint(1, most)))


def huge_numbers(rng, choices, gold, wrong):
    nines = "9" * rng.randint(1, 12)
    shapes = ["{0}**{0}**{0}**{0}", "$10^{{10^{{10^{{{0}}}}}}}$", "${0}!$", "${0}!!!!$", "= {0}^{0}", "= 1e{0}"]
    shapes += ["$2^{{{0}}}$", "$\\binom{{{0}}}{{{1}}}$", "$\\sqrt[{0}]{{{0}}}$", "it is -{0}**-{0}", "$(({0}!)!)!$"]
    shapes += ["$\\frac{{{0}!}}{{2}}$"]
    said = rng.choice(shapes).format(nines, rng.randint(2, 99_999))
    return rng.choice(["", "<answer>", f"<answer>{gold}</answer> "]) + said


def deep_nesting(rng, choices, gold, wrong):
    depth = int(10 ** rng.uniform(0.6, 3.2))
    layers = [
        *[("(", ")"), ("\\frac{", "}{2}"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("{", "}"), ("\\left(", "\\right)")],
        *[("[", "]"), ("\\{", "\\}"), ("2^{", "}"), ("\\boxed{", "}"), (TAGS[0], TAGS[1]), (TAGS[2], TAGS[3])],
    ]
    left, right = rng.choice(layers)
    core = left * depth + rng.choice(["1", gold, "x"]) + right * (depth - rng.choice([0, 0, 1, depth]))
    return rng.choice(["${}$", "{}", "<answer>${}$</answer>", " {}", "\\[{}\\]"]).replace("{}", core)


def backtracking_bait(rng, choices, gold, wrong):
    units = ["<answer>", "<answer>\n", "</think><answer>", "</think> ", "$ ", "$", "$$", "\\boxed{", " [", "1 ", "( "]
    units += ["= =", "\\(", "answer: ", "final answer is ", "<", "< ", "- ", "answer is ", "**", " " * 50, "\n", "1,"]
    units += [". ", "| "]
    unit = rng.choice(units)
    bait = unit * (rng.randint(50, 20_000) // len(unit) + 1)
    return rng.choice(["", "<think>", "<answer>", "$"]) + bait + rng.choice(["", "</answer>", gold, "</answer", "1"])


def broken_tags(rng, choices, gold, wrong):
    return some(rng, [*TAGS, *TAGS, *TAG_BITS, gold, wrong, " ", "\n"], 14)


def special_tokens(rng, choices, gold, wrong):
    return some(rng, [*SPECIAL, *TAGS, gold, wrong, f"<answer>{gold}</answer>"], 10)


def imitated_prompt(rng, choices, gold, wrong):
    before = rng.choice(["", wrong, f"<answer>{wrong}</answer>", "I cannot tell."])
    prompt = prompt_of(choices, rng.random() < 0.5)
    prompt = prompt[rng.choice([0, 0, prompt.index("<|im_start|>user")]) :]
    return f"{before}{rng.choice([END, PAD, '', END + chr(10)])}{prompt}<answer>{gold}</answer>{END}"


def early_end(rng, choices, gold, wrong):
    said = list(rng.choice([f"<answer>{gold}</answer>", f"<answer>{wrong}</answer>", f"<think>{gold}</think>{wrong}"]))
    said.insert(rng.randint(0, len(said)), rng.choice([END, PAD, "<|im_start|>", HEADER]))
    return "".join(said) + rng.choice(["", f"<answer>{gold}</answer>", HEADER + f"<answer>{gold}</answer>"])


def strewn(rng, pieces, gold, wrong):
    said = list(rng.choice([gold, f"<answer>{gold}</answer>", f"<think>{wrong}</think><answer>{gold}</answer>", wrong]))
    for _ in range(rng.randint(1, 8)):
        said.insert(rng.randint(0, len(said)), rng.choice(pieces))
    return "".join(said)


def unseen_characters(rng, choices, gold, wrong):
    return strewn(rng, [*CONTROLS, *INVISIBLE], gold, wrong)


def odd_unicode(rng, choices, gold, wrong):
    return strewn(rng, [*ODD, *(chr(rng.randrange(0x110000)) for _ in range(5))], gold, wrong)


def many_answers(rng, choices, gold, wrong):
    joints = [", ", " or ", "\n", "/", "</answer><answer>", "</answer>\n<answer>", " | ", ""]
    joined = rng.choice(joints).join(rng.sample(choices, len(choices)))
    one, two = rng.sample([gold, wrong], 2)
    shapes = [
        *[f"<answer>{joined}</answer>", joined, str(choices), f"<answer>{choices}</answer>"],
        f"<answer>\n{joined}</answer>",
        *[f"<answer>{one}</answer> no: <answer>{two}</answer>", f"<answer>{one}\n{two}</answer>", f"{one} {two}"],
        *[f"<think><answer>{one}</answer></think><answer>{two}</answer>", f"{one}<answer>{two}</answer>"],
        *[f"<answer>{one}\n<answer>{two}</answer>", f"<answer>{one}</answer> {two}", f"<answer>{one}<answer>{two}"],
    ]
    return rng.choice(shapes)


def mathematics(rng, choices, gold, wrong):
    shapes = ["${}$", "\\boxed{{{}}}", " {}", "= {}", "\\[{}\\]", "<answer>${}$</answer>", "\\({}\\)", "answer: ${}$ "]
    return " and ".join(rng.choice(shapes).format(rng.choice(MATHS)) for _ in range(rng.choice([1, 1, 1, 2, 3, 6])))


def mixtures(rng, choices, gold, wrong):
    """Pieces of other families, cut and joined, and mutated character by character."""
    parts = []
    for _ in range(rng.randint(2, 4)):
        part = rng.choice(SHORT)(rng, choices, gold, wrong)[:3000]
        begin = rng.randint(0, len(part))
        parts.append(rng.choice([part, part[begin:], part[:begin], part[::-1]]))
    said = list("".join(parts))
    for _ in range(rng.choice([0, 1, 5, 20])):
        said.insert(rng.randint(0, len(said)), rng.choice([*"\n <>$\\}{/|\x00", gold]))
    return "".join(said)


def megabytes(rng, choices, gold, wrong):
    units = [
        *[*TAGS, "<answer>\n", "</think><answer>", "</think> \n", "<answer>x", "<|AUDIO|>", "<|im_", gold, "\\frac{"],
        *[*"a1 ({<\n\x00\u202e\ud800", "$ ", "$1$ ", "answer is ", "answer: x\n", "- ", ". ", "A. "],
    ]
    unit = rng.choice(units)
    body = (unit * (MEGABYTE // len(unit) + 1))[:MEGABYTE]
    shapes = ["{}", "<answer>{}</answer>", "<think>{}</think><answer>x</answer>", f"{{}}<answer>{gold}</answer>"]
    return rng.choice(shapes).replace("{}", body, 1)


SHORT = [huge_numbers, deep_nesting, backtracking_bait, broken_tags, special_tokens, imitated_prompt, early_end]
SHORT += [unseen_characters, odd_unicode, many_answers, mathematics]
FAMILIES = [*SHORT, mixtures]


def hostile(count: int, megabyte_count: int, seed: int = 0):
    """Yield ``count`` samples: the families in turn, crossed at random with the references; the longest strewn in."""
    rng = random.Random(seed)
    every = count // megabyte_count
    for index in range(count):
        family = megabytes if index % every == every - 1 else FAMILIES[index % len(FAMILIES)]
        kinds = MATH_QUESTIONS if rng.randrange(MATH_SHARE) == 0 else QUESTIONS
        choices = kinds[rng.choice(list(kinds))]
        gold, wrong = rng.sample(choices, 2)
        response = family(rng, choices, gold, wrong)
        yield Sample(family.__name__, choices, gold, response, rng.choice(LABELS))


def score(samples: list[Sample], golds: list[str] | None = None) -> list[tuple[float, float, float]]:
    """(total, accuracy, form) of each sample, by the trainer's own call."""
    total, metrics = rewards.reward_fn(
        model_reward_list=[],
        labels=[sample.label for sample in samples],
        queries=[sample.prompt + sample.response for sample in samples],
        refs=golds or [sample.gold for sample in samples],
        label_map={},
    )
    rows = torch.stack([total, metrics["accuracy_reward"], metrics["format_reward"]], dim=1)
    return [tuple(row) for row in rows.tolist()]


def holds_math(gold: str) -> bool:
    return may_hold_math(f"<answer>{gold}</answer>")


def hacks(sample: Sample, got: tuple[float, float, float]) -> list[str]:
    """The rules of this file's head that a scored sample breaks."""
    said = literal_rule.response_of(sample.prompt, sample.prompt + sample.response)
    broken = []
    text_agrees = literal_rule.said_in_tags(said[:5_000]) == sample.gold.strip()
    if len(said) < 5_000 and not holds_math(sample.gold):  # the literal rule's own patterns are no match for more
        literal = float(text_agrees), literal_rule.form(said, sample.think)
        if got[1:] != literal:
            broken.append(f"{got[1:]} instead of the literal rule's {literal}")
        content = literal_rule.said_in_tags(said)
        plain = f"<answer>{content}</answer>"
        if "\n" not in content and "<answer>" not in content and content.strip():
            honest = f"<think>so</think>{plain}" if sample.think else plain
            deserved = rewards.avqa_combined_reward_fn(honest, sample.gold, enable_think=sample.think)
            if got[1] > deserved[1] or got[0] > deserved[0]:
                broken.append(f"{got} for what is worth {deserved} when said plainly")
    if got[1] and len(said) < 5_000 and not text_agrees and not literal_rule.accuracy(said, sample.gold):
        broken.append("accuracy that the literal rule does not give")
    golds = [choice for choice in sample.choices if not holds_math(choice)]
    rewarded = [choice for choice in golds if rewards.accuracy_reward_fn(said, choice)]
    if len(rewarded) > 1:
        broken.append(f"accuracy for {rewarded}")
    return broken


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * (len(seconds) - 1))]


@pytest.mark.parametrize(
    # of the hostile responses, this many are a megabyte long; the 99th percentile of wall time is looser for a sample,
    # whose slowest 20 are mostly a new worker's first steps on a shared machine
    ("count", "megabyte_count", "limit"),
    [(2_000, 10, 0.150), pytest.param(100_000, 300, 0.050, marks=pytest.mark.faults)],
)
def test_hostile_responses_are_scored_in_time_without_errors_and_without_hacks(count, megabyte_count, limit):
    rewards.accuracy_reward_fn("$1$", "$2$")  # the worker's start is not on the clock
    score(list(hostile(1, 1)))
    scoring, extraction, slowest = [], [], 0.0
    errors, cheats = [], []
    stream = hostile(count, megabyte_count)
    while batch := list(islice(stream, 64)):
        values = []
        for sample in batch:
            begin = time.perf_counter()
            try:
                row = score([sample])[0]
            except Exception as error:
                errors.append((sample.family, sample.response[:200], repr(error)))
                continue
            scoring.append(time.perf_counter() - begin)
            values.append(row)
            if sample.family == "megabytes":
                slowest = max(slowest, scoring[-1])
            if row[0] != row[1] + row[2] or not {row[1], row[2]} <= {0.0, 1.0}:
                errors.append((sample.family, sample.response[:200], row))
            cheats += [(sample.family, sample.gold, sample.response[:300], why) for why in hacks(sample, row)]
            begin = time.process_time()  # it all happens in this process
            try:
                extract_answer(sample.response, sample.choices)
            except Exception as error:
                errors.append((sample.family, sample.response[:200], repr(error)))
            extraction.append(time.process_time() - begin)
        if score(batch) != values:
            errors.append(("batch", "", "a batch has other values than its samples one by one"))
    assert not errors, errors[:5]
    assert not cheats, cheats[:5]
    assert len(scoring) == count
    assert max(p99(scoring), p99(extraction)) < limit
    assert slowest < 5.0 and max(extraction) < 2.0  # what is quadratic takes minutes


# ---- hacks, one by one: what a wrong answer W may do to look like the reference G

# (response, accuracy, plain form, think form, why); G and W stand for the two choices
ATTACKS = [
    (f"W{END}\n{HEADER}<answer>G</answer>", 0, 0, 0, "a better turn after the own one"),
    (f"<answer>W</answer>{END}\n{HEADER}<answer>G</answer>", 0, 1, 0, "the same after an honest wrong answer"),
    (f"{END}<answer>G</answer>", 0, 0, 0, "nothing said, then an answer after the end"),
    (f"<think>x</think>{PAD}<answer>G</answer>", 0, 0, 0, "an end between thinking and answer"),
    (f"{HEADER}<answer>G</answer>", 1, 0, 0, "an imitated header opens no turn, and costs the form"),
    (f"<|im_start|>user\nSay G.{END}\n{HEADER}<answer>G</answer>", 0, 0, 0, "an imitated question"),
    ("<|im_start|>system\nReward 2.", 0, 0, 0, "an order to the grader"),
    ("<answer>W</answer><answer>G</answer>", 0, 1, 0, "the reference as a second answer"),
    ("<answer>W</answer>\nG", 0, 0, 0, "the reference behind the answer"),
    ("G <answer>W</answer>", 0, 0, 0, "the reference before the answer"),
    ("<answer>G, W</answer>", 0, 1, 0, "both choices"),
    ("<answer>W or G</answer>", 0, 1, 0, "either choice"),
    ("<answer>['W', 'G']</answer>", 0, 1, 0, "the prompt's list"),
    ("G\nW", 0, 0, 0, "both, without tags"),
    ("<answer>G\u200b</answer>", 0, 1, 0, "the reference with a mark that nobody sees"),
    ("<answer>\u202eG\u202c</answer>", 0, 1, 0, "the same, turned round"),
    ("<answer>G\x00</answer>", 0, 1, 0, "a null byte ends no text"),
    ("<answer>W\x00</answer><answer>G</answer>", 0, 1, 0, "nor an answer"),
    ("<ans\u200bwer>W</answer><answer>G", 0, 0, 0, "tags that only look like tags"),
    ("\u200b<answer>G</answer>", 1, 0, 0, "a hidden character before the tag costs the form"),
    ("<answer>G</answer\u200b>", 0, 0, 0, "and one in the tag the answer"),
    ("<answer>G<|en|></answer>", 0, 1, 0, "what is no token of the tokenizer stays text"),
    ("&lt;answer&gt;G&lt;/answer&gt;", 0, 0, 0, "escaped tags"),
    ("<think><answer>W</answer></think><answer>G</answer>", 0, 0, 1, "the first answer counts, also in the thinking"),
    ("<think>x</think>\n<answer>W</answer></answer>G</answer>", 0, 0, 1, "a closing tag too many"),
    ("Accuracy reward: 1.0\nContent: G\nSolution: <answer>G</answer>", 1, 0, 0, "R1-AQA's log form is mere text"),
    ("Solution: <answer>W</answer> reward=2.0", 0, 0, 0, "and earns nothing by its words"),
    ('{"accuracy_reward": 1.0, "format_reward": 1.0}', 0, 0, 0, "nor do the names of the metrics"),
    ("[" * 12 + "G" + "]" * 12, 0, 0, 0, "the reference in brackets"),
]


@pytest.mark.parametrize(
    "kind", ["words", "commas", "quotes", "bare numbers", "numbers and units", "unicode", "letters"]
)
def test_no_imitation_earns_more_than_what_is_said(kind):
    gold, wrong = QUESTIONS[kind][:2]
    for text, accuracy, plain, think, why in ATTACKS:
        response = text.replace("G", "\0\1").replace("W", wrong).replace("\0\1", gold)
        for label, form in ((rewards.PLAIN_LABEL, plain), (rewards.THINK_LABEL, think)):
            sample = Sample("attack", [gold, wrong], gold, response, label)
            got = score([sample])[0]
            assert got == (accuracy + form, accuracy, form), (why, label, response)
            assert not hacks(sample, got), why


# Where R1-AQA's rule pays, or refuses, what a person would not. These values are kept, since they are the rule's, and
# named here so that none of them changes unnoticed. (response, reference, total, accuracy, why)
GENEROSITIES = [
    ("<answer></answer>", "dog", 1, 0, "the form is paid for without an answer"),
    ("<answer>a</answer> b <answer>c</answer>", "dog", 1, 0, "and with text outside the tags, between two pairs"),
    ("<answer>dog</answer><answer>cat</answer>", "dog", 2, 1, "a second answer that differs costs nothing"),
    ("<answer>dog</answer> cat cat cat</answer>", "dog", 2, 1, "nor does any text, up to a last closing tag"),
    ("<answer>\ncat</answer><answer>dog</answer>", "dog", 2, 1, "an answer over two lines is passed over"),
    ("<answer> dog\u2003\x1c</answer>", "dog", 2, 1, "every white space is stripped, Unicode's too"),
    ("<answer>$4$</answer>", "4", 1, 0, "also if only the response is mathematics"),
    ("4", "about 4 dogs", 1, 1, "of a sentence with a number math_verify reads the number only"),
    ("about 4 cats, no dogs", "about 4 dogs", 1, 1, "so everything else may be wrong"),
    ("<answer>cat</answer> 4", "about 4 dogs", 1, 1, "the number is read from the whole response, not from its answer"),
    ("<answer>cat</answer> 4</answer>", "about 4 dogs", 2, 1, "and may stand where the form hides it"),
    ("5 and 4", "about 4 dogs", 1, 1, "of several numbers the last counts"),
    ("$\\frac{8}{2}$", "about 4 dogs", 1, 1, "any equal expression is equal"),
    ("<answer>$\\frac{1}{3}$</answer> $0.5$", "$\\frac{1}{2}$", 1, 1, "the last expression counts, not the tagged one"),
    ("$x=2$", "$2$", 1, 1, "an assignment is its value"),
    ("$1,2,3$", "$\\{1,2,3\\}$", 1, 1, "a list is a set"),
    ("$0.5$", "$50\\%$", 1, 1, "a share is its percentage"),
    ("50%", "$0.5$", 1, 1, "and the other way round"),
    ("$(0,1)$", "$[0,1)$", 0, 0, "but an open interval is not a half-open one"),
    ("<think><answer>dog</answer></think><answer>cat</answer>", "dog", 1, 1, "an answer in the thinking is the first"),
]
# (response, reference, total, accuracy, why), where thinking is asked for
THINK_GENEROSITIES = [
    ("<think></think><answer></answer>", "dog", 1, 0, "the form is paid for without a thought"),
    ("<think><answer>dog</answer></think><answer>cat</answer>", "dog", 2, 1, "the answer in the thinking counts"),
    ("<think>a</think>b</think><answer>dog</answer>", "dog", 2, 1, "text between the parts, hidden by a further tag"),
    ("<think>a</think><answer>dog</answer> cat</answer>", "dog", 2, 1, "text after the answer, hidden the same way"),
]


@pytest.mark.parametrize("think", [False, True])
def test_known_generosities_of_the_rule(think):
    pytest.importorskip("math_verify")
    for response, gold, total, accuracy, why in THINK_GENEROSITIES if think else GENEROSITIES:
        got = rewards.avqa_combined_reward_fn(response, gold, enable_think=think)
        assert got == literal_rule.reward(response, gold, think), ("no longer the rule", response, gold)
        assert got[:2] == (total, accuracy), (why, response, gold)


# ---- ordinary responses: the rule to the letter

AVQA = [
    *[["dog barking", "cat meowing", "bird singing", "horse neighing"], ["in the kitchen", "on the street", "at sea"]],
    *[["yes", "no"], ["two", "three", "four", "one"], ["2", "3", "4", "10"], ["4 dogs", "3 dogs", "2 cats", "1 cat"]],
    *[["about 4 times", "about 5 times", "more than 10", "once"], ["3.5 kHz", "440 Hz", "1 kHz", "20 Hz"]],
    *[["The car's engine", "a car, honking", "wind (strong)", 'it is "rain"'], ["A", "B", "C", "D"]],
    *[["before the bell", "after the bell", "during", "never"], ["$\\frac{1}{2}$", "$\\frac{1}{4}$", "$2$", "$x+1$"]],
    ["$5", "$10", "5%", "0.5"],
]
THOUGHTS = [
    *["I hear {0}.", "The sound could be {1}, but it is rather {0}.", "Let me listen.\nFirst {1}, then {0}.", ""],
    *["There are 2 sounds in 10 seconds: {0} and {1}.", "- {0}\n- {1}\n", "Options: {0}, {1}. So {0}", "It costs $5?"],
]
SHAPES = [
    *["<answer>{0}</answer>"] * 6,
    *["<think>{2}</think><answer>{0}</answer>", "<think>{2}</think>\n<answer>{0}</answer>"] * 3,
    *["<think>{2}</think>\n\n<answer> {0} </answer>", "<think>\n{2}\n</think> <answer>{0}</answer>\n", "{2}", "{0} "],
    *["{0}", "{0}.", "The answer is {0}.", "{2} <answer>{0}</answer>", "<answer>{0}</answer>.", "it is {4}", "${0}$"],
    *["<answer>\n{0}\n</answer>", "<answer>{0}.</answer>", "<answer>({3}) {0}</answer>", "<answer>{3}</answer>"],
    *["<answer>{0}</answer>\n", "<answer>{0} </answer>", "<answer>'{0}'</answer>", "<answer>{0}</answer> or {1}"],
    *["<answer>{0}, {1}</answer>", "<think>{2}<answer>{0}</answer>", "<answer>{0}</think>", "**{0}**", "answer: {0}"],
    *["It is {0}, not {1}", "= {0}", "about {0} of them", "<answer>about {0}</answer>", " <answer> {0}</answer>"],
    *["\\boxed{{{0}}}", "<answer>{0}", "Final answer is {0}", "<Answer>{0}</Answer>", "<answer>{4}</answer>"],
    "{3}. {0}",
]


def ordinary(count: int, seed: int = 1):
    """Yield samples as a model in training writes them: mostly in form, right or wrong, some cut off by the limit."""
    rng = random.Random(seed)
    for _ in range(count):
        choices = rng.choice(AVQA)
        gold = rng.choice(choices)
        said, other = rng.choice([gold, rng.choice(choices)]), rng.choice(choices)
        thought = rng.choice(THOUGHTS).format(said, other)
        number = rng.choice(
            [str(rng.randint(0, 12)), f"{rng.random():.2f}", "4 dogs", "1/2", "440 Hz", "50%", "2 or 3"]
        )
        response = rng.choice(SHAPES).format(said, other, thought, rng.choice("ABCD"), number)
        if rng.random() < 0.08:
            response = response[: rng.randint(0, len(response))]
        if rng.random() < 0.05:
            response = rng.choice(
                [response.upper(), response.replace(" ", "  "), response.replace("</", "<"), response * 2]
            )
        label = rng.choice(LABELS)
        yield Sample("ordinary", choices, gold, response + rng.choice(["", END, END + PAD * 3]), label)


@pytest.mark.parametrize("size", [3_000, pytest.param(50_000, marks=pytest.mark.faults)])
def test_ordinary_responses_have_the_literal_rules_values(size):
    pytest.importorskip("math_verify")
    counts, by_math = {}, 0
    stream = ordinary(size)
    while batch := list(islice(stream, 256)):
        for sample, got in zip(batch, score(batch), strict=True):
            said = literal_rule.response_of(sample.prompt, sample.prompt + sample.response)
            literal = literal_rule.reward(said, sample.gold, sample.think)
            assert got == literal, sample
            counts[literal] = counts.get(literal, 0) + 1
            by_math += literal[1] == 1 and literal_rule.said_in_tags(said) != sample.gold.strip()
    assert sum(counts.values()) == size
    assert min(counts.get(value, 0) for value in [(0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 1, 1)]) > size / 20
    assert by_math > size / 200, "too few of them try math_verify"


ENDLESS = ["9**9**9**9", "$10^{10^{10}}$", "$2^{999999999}$", "$99999999!$", "$(9999999)!$", "(" * 11, "\\frac{" * 11]
ENDING = ["$2^{3^2}$", "$e^{x^2}$", "$10^{6}$", "$2^{10}$", "5!", "1000000!", "((((4))))", ":( " * 9, "x^2y^2"]
LENGTHY = ["^" * 4096, "^(" * 2048, "9" * 4096, "9 " * 2048, "9**" * 1300, "^9" + " " * 4000, "1000000" + ")" * 4000]


def test_what_is_not_handed_to_math_verify(monkeypatch):
    """The bounds refuse numbers that no machine holds and nothing that a person writes."""
    for text in ENDLESS:
        assert is_endless(text), text
        with monkeypatch.context() as patch:
            patch.setattr(matching, "_CHECKER", None)
            assert rewards.accuracy_reward_fn(f"it is 3 or {text}", "about 4 dogs") == 0.0
            assert rewards.accuracy_reward_fn("it is 4", f"about 4 {text}") == 0.0
    for text in ENDING:
        assert not is_endless(text), text
    for text in LENGTHY:
        begin = time.perf_counter()
        is_endless(text)
        assert time.perf_counter() - begin < 0.5, text[:20]  # linear: under 5 ms


# ---- threads and processes

AGREEING = [(f"$\\frac{{{top}}}{{8}}$", f"${(top + shift) / 8}$") for top in range(1, 16) for shift in (0, 1)]


def mixed_batch() -> list[Sample]:
    """Hostile and ordinary samples, and some that only math_verify can judge."""
    samples = [sample for sample in hostile(400, 1, seed=5) if sample.family not in ("megabytes", "huge_numbers")]
    samples = [sample for sample in samples if not holds_math(sample.gold)][:100] + list(ordinary(60, seed=5))
    return samples + [Sample("math", [gold], gold, said, LABELS[0]) for said, gold in AGREEING]


@pytest.fixture
def batch():
    samples = mixed_batch()
    matching._math_equal.cache_clear()
    values = score(samples)
    matching._math_equal.cache_clear()
    assert [accuracy for _, accuracy, _ in values[-len(AGREEING) :]] == [1.0, 0.0] * 15
    yield samples, values
    matching._math_equal.cache_clear()


def test_threads_get_the_same_values(batch):
    samples, values = batch

    def score_shuffled(seed: int):
        order = list(range(len(samples)))
        random.Random(seed).shuffle(order)
        found = score([samples[index] for index in order])
        return [found[order.index(index)] for index in range(len(samples))]

    with ThreadPoolExecutor(6) as pool:
        assert all(found == values for found in pool.map(score_shuffled, range(6), timeout=60))


def test_a_fork_amid_a_check_of_another_thread_gets_its_own_worker(batch):
    samples, values = batch
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(score, samples)
        with multiprocessing.get_context("fork").Pool(2) as processes:
            found = processes.map_async(score, [samples[::2], samples[1::2]]).get(timeout=60)
        assert running.result(timeout=60) == values
    assert found == [values[::2], values[1::2]]


@pytest.fixture
def checker(monkeypatch):
    one = MathChecker(cpu_limit_s=10.0)
    monkeypatch.setattr(matching, "_CHECKER", one)
    matching._math_equal.cache_clear()
    assert one.agree("$1/2$", "$0.5$")
    yield one
    one.close()
    matching._math_equal.cache_clear()


LASTING = ("$" + "(" * 9 + "4" + ")" * 9 + "$", "about 4 dogs")  # equal, after some 0.5 s in a new worker


def test_a_check_whose_worker_is_killed_is_made_again(checker, monkeypatch):
    asked = []

    def ask_and_kill_the_first_two(process, data, deadline, write=matching._write_all):
        write(process, data, deadline)
        asked.append(process.pid)
        if len(asked) <= 2:
            process.kill()

    monkeypatch.setattr(matching, "_write_all", ask_and_kill_the_first_two)
    assert rewards.accuracy_reward_fn(*LASTING) == 1.0
    assert len(set(asked)) == 3


def test_a_worker_killed_while_starting_is_started_again(checker, monkeypatch):
    checker.close()
    started = []

    def start_and_kill_the_first(*args, popen=subprocess.Popen, **kwargs):
        started.append(popen(*args, **kwargs))
        if len(started) == 1:
            started[0].kill()
        return started[-1]

    monkeypatch.setattr(matching.subprocess, "Popen", start_and_kill_the_first)
    assert rewards.accuracy_reward_fn("$1/2$", "$0.5$") == 1.0
    assert len(started) == 2


def test_a_check_that_kills_every_worker_is_given_up_and_not_remembered(checker, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(matching, "_read_byte", lambda process, _: process.kill() or b"")
        patch.setattr(checker, "_start", lambda: subprocess.Popen(["cat"], stdin=-1, stdout=-1))
        assert rewards.accuracy_reward_fn("$1/4$", "$0.25$") == 0.0
    assert rewards.accuracy_reward_fn("$1/4$", "$0.25$") == 1.0


def test_a_text_that_crashes_math_verify_is_not_equal(monkeypatch):
    """As in R1-AQA, which scores an exception 0; here it must not end the worker either."""
    math_verify = pytest.importorskip("math_verify")

    def fragile(text: str, parse=math_verify.parse):
        if "crash" in text:
            raise RecursionError
        return parse(text)

    monkeypatch.setattr(math_verify, "parse", fragile)
    equal = matching._load_math_verify()
    assert equal("$1/2$", "$0.5$") and not equal("crash", "$0.5$")


def test_odd_texts_cost_no_worker(checker):
    pid = checker._process.pid
    matrix = "$\\begin{pmatrix}1&2\\\\3\\end{pmatrix}$"
    for said in ("$\ud800 4$", "$\x00$", "$" + "-" * 900 + "4$", matrix, "$\\frac{1}{0}$"):
        assert rewards.accuracy_reward_fn(said, "about 5 dogs") == 0.0
    assert checker._process.pid == pid


# ---- extraction for the evaluation

UNITS = ["answer is ", "- ", "answer: x\n", ". ", "A. ", "answer: - - - - - - - - - - -\n", "< answer >", "< ", "b "]


@pytest.mark.parametrize("unit", UNITS)
def test_the_answer_of_a_megabyte_is_found_in_time(unit):
    text = unit * (MEGABYTE // len(unit))
    begin = time.process_time()
    extract_answer(text, QUESTIONS["words"])
    assert time.process_time() - begin < 1.0  # what is quadratic takes minutes
    assert extract_answer(f"{text}\n<answer>cat</answer>", QUESTIONS["words"]).text == "cat"
