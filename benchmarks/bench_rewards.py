#!/usr/bin/env python3
"""Rewards a second against R1-AQA's rule as it is written, with the same values.

    python benchmarks/bench_rewards.py

Baseline: ``tests/literal_rule.py``, the rule word by word: ``math_verify`` parses and compares every response and
reference, then the answers are compared as text. Ours: ``reward_fn``. Both are given whole decoded sequences and run in
this process, ours with its checker process beside it.

Text: questions as AVQA asks them, 8 responses each; 90 % of the questions have choices in words, 6 % numbers, 4 %
phrases with a number ("more than 3 times"), where ``math_verify`` has a say. Of the responses 45 % are right and in the
form, 30 % wrong, 10 % without tags, 10 % reason before they answer (half of these with numbers), 5 % are cut off or say
all choices. Each round draws new texts, and the reward's cache of comparisons is cleared before it.

Limits: all values equal, and three times as many rewards a second.
"""

import functools
import random
import statistics

from harness import Report, make_parser, parse, ratio, timed

LIMIT = 3.0  # times as many rewards a second
# fmt: off
WORDS = [
    "motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car", "dog", "cat", "rooster", "church bell",
    "playing the guitar", "playing the piano", "train whistle", "ambulance siren", "fire truck", "helicopter",
    "lawn mower", "chainsaw", "people clapping", "baby crying", "typing on a keyboard", "vacuum cleaner",
    "ocean waves", "thunder", "rain on a roof", "fireworks", "frying food", "skateboarding", "basketball bounce",
    "horse running", "cow lowing", "race car", "hair dryer", "woodpecker pecking a tree", "door knock",
    "toilet flush",
]
# fmt: on
COUNTS = [str(count) for count in range(1, 11)]
PHRASES = [f"{often} {count} times" for often in ("about", "more than", "at least") for count in range(2, 10)]
QUESTIONS = (
    "What is making the sound in the video?",
    "What happened in the video?",
    "Where does this happen?",
    "How many times does it sound in the video?",
)
FORM = "Output the final answer in <answer> </answer>."


def make_samples(questions: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """Draw questions with 8 responses each.

    :return: Prompt, whole sequence and bare reference of each response.
    """
    samples = []
    for _ in range(questions):
        (pool,) = rng.choices((WORDS, COUNTS, PHRASES), (90, 6, 4))
        choices = rng.sample(pool, 4)
        gold = choices[0]
        rng.shuffle(choices)
        asked = rng.choice(QUESTIONS).replace("video", "audio")
        prompt = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"Audio 1: <|audio_bos|>{'<|AUDIO|>' * 250}<|audio_eos|>\n{asked} Please choose the answer from the "
            f"following options: {choices}. {FORM}<|im_end|>\n<|im_start|>assistant\n"
        )
        for _ in range(8):
            samples.append((prompt, f"{prompt}{respond(choices, gold, rng)}<|im_end|><|endoftext|>", gold))
    return samples


def respond(choices: list[str], gold: str, rng: random.Random) -> str:
    said = rng.choice(choices)
    wrong = rng.choice([choice for choice in choices if choice != gold])
    (kind,) = rng.choices(("right", "wrong", "bare", "reasoned", "odd"), (45, 30, 10, 10, 5))
    if kind in ("right", "wrong"):
        return f"<answer>{gold if kind == 'right' else wrong}</answer>"
    if kind == "bare":
        return rng.choice((said, f"The answer is {said}.", f"I think it is {said}, from the sound at the start."))
    if kind == "reasoned":
        heard = rng.choice(
            (f"{rng.randint(2, 9)} sounds follow each other within {rng.randint(10, 30)} seconds", "it hums")
        )
        return f"In the audio {heard}, which is typical of {said}, not of {wrong}.\n<answer>{said}</answer>"
    return rng.choice((f"<answer>{said}", f"<answer>{', '.join(choices)}</answer>", f"{said} <answer></answer>"))


def main() -> None:
    parser = make_parser(__doc__, rounds=7, demo=False)
    parser.add_argument("--questions", type=int, default=125, help="questions a round, of 8 responses each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts")
    args = parse(parser)

    report = Report("rewards", args.rounds)
    import literal_rule

    from aqa.rewards import matching
    from aqa.rewards.r1_aqa import PLAIN_LABEL, reward_fn

    def literal(samples: list[tuple[str, str, str]]) -> list[tuple[float, ...]]:
        return [literal_rule.reward(literal_rule.response_of(prompt, text), gold) for prompt, text, gold in samples]

    def ours(samples: list[tuple[str, str, str]]) -> list[tuple[float, ...]]:
        labels, texts, golds = [PLAIN_LABEL] * len(samples), [s[1] for s in samples], [s[2] for s in samples]
        total, parts = reward_fn([], labels, texts, golds, None)
        return list(zip(*(x.tolist() for x in (total, parts["accuracy_reward"], parts["format_reward"])), strict=True))

    seconds: dict[str, list[float]] = {"literal": [], "ours": []}
    different, checked, compared = [], 0, 0
    for round_ in range(args.rounds + 1):
        samples = make_samples(args.questions, random.Random(f"{args.seed} {round_}"))
        matching._math_equal.cache_clear()
        values = {}
        for name, way in (("literal", literal), ("ours", ours)):
            took, values[name] = timed(functools.partial(way, samples))
            if round_:  # the first warms up, and starts the checker
                seconds[name].append(took.wall)
        checked += matching._math_equal.cache_info().misses
        compared += len(samples)
        pairs = zip(samples, values["literal"], values["ours"], strict=True)
        different += [(s[1][len(s[0]) :], s[2], a, b) for s, a, b in pairs if a != b]
    size = args.questions * 8
    table = {name: round(size / statistics.median(times)) for name, times in seconds.items()}
    for name, rate in table.items():
        print(f"{name:8}  {rate:7} rewards/s")
    print(f"math_verify asked for {checked} of {compared} by ours")
    for text, gold, literal_value, own in different[:5]:
        print(f"  {text!r} for {gold!r}: literal {literal_value}, ours {own}")
    report.judge("rewards: times as many a second", ratio(seconds["literal"], seconds["ours"]), at_least=LIMIT)
    report.judge(f"rewards: values that differ, of {compared}", len(different), at_most=0)
    report.finish(samples_a_round=size, rewards_per_second=table, asked_math_verify=checked)


if __name__ == "__main__":
    main()
