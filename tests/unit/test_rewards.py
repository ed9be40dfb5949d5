"""The rewards are R1-AQA's, on the response alone, for any text, in any thread and in bounded time.

The tables were checked once against R1-AQA's own functions (``src/utils/rewards.py``). The rule's own
patterns are in ``literal_rule.py``, with which ``test_hostile_text.py`` compares these rewards.
"""

import logging
import os
import re
import signal
import sys
import textwrap
import time

import literal_rule
import pytest
import torch
from conftest import EXAMPLE, run_code, wait_until_gone
from hypothesis import given, settings
from hypothesis import strategies as st

from aqa.data.prompts import choices_in, render_prompt
from aqa.rewards import matching
from aqa.rewards import r1_aqa as rewards
from aqa.rewards.matching import MathChecker, MathCheckUnavailable, may_hold_math
from aqa.rewards.named import NAMED, RewardError, find_reward
from aqa.training.flags import REWARDS
from demo.tiny_model import build_processor

HEADER = "<|im_start|>assistant\n"
QUESTION = "What barks? Please choose the answer from the following options: ['dog', 'cat']."
FORM = "Output the final answer in <answer> </answer>."
# a decoded Qwen2-Audio prompt with expanded audio placeholders
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"Audio 1: <|audio_bos|>{'<|AUDIO|>' * 3}<|audio_eos|>\n{QUESTION} {FORM}<|im_end|>\n{HEADER}"
)
END = "<|im_end|>"
PAD = "<|endoftext|>"

# (response, bare gold, reward, why)
ACCURACY = [
    ("<answer>dog</answer>", "dog", 1, "the reference itself"),
    ("<answer> dog\t</answer>", " dog", 1, "both sides are stripped"),
    ("dog\n", "dog", 1, "without tags the whole response is the answer"),
    ("It barks. <answer>dog</answer> Surely.", "dog", 1, "text around the tags does not matter for accuracy"),
    ("<think>cat?</think><answer>dog</answer>", "dog", 1, "nor does thinking"),
    ("<answer>Dog</answer>", "dog", 0, "case matters"),
    ("<answer>dog.</answer>", "dog", 0, "so does punctuation"),
    ("<answer>cat</answer>", "dog", 0, "wrong option"),
    ("", "dog", 0, "nothing said"),
    ("<answer></answer>", "dog", 0, "empty answer"),
    ("<answer>cat</answer><answer>dog</answer>", "dog", 0, "the first answer counts"),
    ("<answer>\ndog\n</answer>", "dog", 0, "R1-AQA's pattern does not cross lines, and the tags make the text differ"),
    ("<answer>cat\n<answer>dog</answer>", "dog", 1, "so the first answer that lies on one line counts"),
    ("<answer><answer>dog</answer></answer>", "dog", 0, "the outer opening tag starts the answer"),
    ("<answer>dog", "dog", 0, "no closing tag: the whole text, tag included, is compared"),
    ("<answer>['dog', 'cat']</answer>", "dog", 0, "copying the options is no answer"),
    ("<answer>4</answer>", "4", 1, "a number as text"),
    ("It is $\\frac{1}{2}$", "$0.5$", 1, "equal for math_verify only"),
    ("<answer>$x+1$</answer>", "$1+x$", 1, "equal for math_verify only"),
    ("<answer>about 4 dogs</answer>", "some 4 cats", 1, "math_verify reads nothing but the number: R1-AQA's value"),
    ("<answer>4.0</answer>", "4", 0, "right behind the tag math_verify sees no number: R1-AQA's value"),
    ("it is 4", "4", 0, "the reference is wrapped before it is parsed, and then holds no number either"),
    ("<answer>$4$</answer>", "$5$", 0, "different numbers"),
    ("$1$", "$2x+z=1$", 1, "the response is verify's first argument ..."),
    ("$2x+z=1$", "$1$", 0, "... and verify is not symmetric"),
]


MATHS = st.lists(
    st.one_of(
        st.sampled_from(
            ["$", "\\", "(", ")", "[", "]", "\\frac{1}{2}", "\\boxed{", "}", "1", "٣", "²", ".5", "-", "**"]
        ),
        st.sampled_from(["€", "=", " ", "\n", "\x1c", "\u00a0", "\x85", "x", "and", ",", "%", "_", "+", "/"]),
        st.sampled_from(["answer", "final answer is", "</answer>"]),
    ),
    max_size=9,
).map("".join)


@pytest.fixture(autouse=True)
def warn_again():
    """Warnings are given once per process: forget those of earlier tests."""
    for warn in (rewards._warn_unknown_label, rewards._warn_no_header, matching._warn_unavailable):
        warn.cache_clear()


@pytest.fixture
def checker():
    one = MathChecker()
    yield one
    one.close()


@pytest.mark.parametrize(("content", "gold", "expected", "why"), ACCURACY)
def test_accuracy_table(content, gold, expected, why):
    assert rewards.accuracy_reward_fn(content, gold) == expected, why
    assert rewards.accuracy_reward_fn(content, f"<answer>{gold}</answer>") == expected, f"{why} (wrapped by the caller)"


@settings(max_examples=400, deadline=None)
@given(text=MATHS)
def test_where_no_math_is_expected_math_verify_finds_none(text):
    """Contract with the installed math_verify: skipping it must never change a value."""
    parse = pytest.importorskip("math_verify").parse
    if not may_hold_math(text):
        assert parse(text) == []


@pytest.mark.parametrize(
    "text",
    [" **-(-5+1)", " **€-5", "=5", "5", "\x1c5", " [x] ", "\\(x\\)", "\\[x\\]", "$x$", "\\frac{1}{2}", "\\boxed{x}"],
)
def test_where_math_verify_finds_math_it_is_asked(text):
    parse = pytest.importorskip("math_verify").parse
    assert parse(text) != [] and may_hold_math(text)


def test_texts_beyond_the_limit_are_compared_as_text_only(monkeypatch):
    monkeypatch.setattr(matching, "_CHECKER", None)
    long = "word " * 4000
    assert rewards.accuracy_reward_fn(f"{long} $1/2$", "$0.5$") == 0.0
    assert rewards.accuracy_reward_fn(f"{long} <answer>$0.5$</answer>", "$0.5$") == 1.0


@pytest.mark.parametrize(
    ("tail", "response", "why"),
    [
        ("<answer>dog</answer>" + END, "<answer>dog</answer>", "end of turn"),
        ("<answer>dog</answer>" + END + PAD * 3, "<answer>dog</answer>", "end of turn and padding"),
        ("<answer>dog</answer>" + PAD, "<answer>dog</answer>", "the other end-of-sequence token"),
        ("<answer>dog", "<answer>dog", "cut off by the token limit"),
        ("", "", "nothing generated"),
        (" a\n" + END, " a\n", "white space is the response's own"),
        (f"cat{END}\n{HEADER}<answer>dog</answer>{END}", "cat", "an imitated turn"),
        (f"{END}\n<|im_start|>user\n{QUESTION}{END}\n{HEADER}<answer>dog</answer>{END}", "", "an imitated prompt"),
        (f"cat{HEADER}<answer>dog</answer>{END}", "catassistant\n<answer>dog</answer>", "a header opens no turn"),
        ("<|audio_eos|><answer>dog</answer>" + END, "<answer>dog</answer>", "a control token"),
        ("<|im_<|AUDIO|>end|>dog", "<|im_end|>dog", "what a token leaves behind is mere text"),
        (f"<answer>cat</answer>{PAD}<answer>dog</answer>{END}", "<answer>cat</answer>", "imitated padding"),
    ],
)
def test_the_response_is_the_models_first_turn(tail, response, why):
    assert rewards.extract_response(PROMPT + tail) == response, why
    assert rewards.extract_response(PAD * 5 + PROMPT + tail) == response, f"{why}, prompt padded on the left"


def test_every_added_token_is_scored_as_r1_aqa_scores_it():
    """R1-AQA decodes the sampled ids without special tokens; here the whole decoded sequence is scored."""
    tokenizer = build_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|en|>", "<|0.00|>", "[noise]"]})
    tokenizer.add_tokens(["<tool_call>", "<|fim_prefix|>"])  # added, but not special: decoding keeps them
    special = rewards.special_tokens(tokenizer)
    seen = set()
    for added in tokenizer.get_added_vocab():
        for response in (
            f"{added}<answer>dog</answer>",
            f"<answer>do{added}g</answer>",
            f"<answer>dog</answer>{added}",
            f"<ans{added}wer>dog</answer>",
            f"<answer>dog</answer>{added}<answer>cat</answer>",
        ):
            ids = tokenizer(response)["input_ids"]
            ends = [i for i, token in enumerate(ids) if tokenizer.decode([token]) in (END, PAD)]
            sampled = ids[: ends[0] + 1] if ends else ids
            expected = literal_rule.reward(tokenizer.decode(sampled, skip_special_tokens=True), "dog")
            query = tokenizer.decode(tokenizer(PROMPT)["input_ids"] + sampled + [tokenizer.pad_token_id] * 2)
            total, _ = rewards.reward_fn([], ["avqa_rule"], [query], ["dog"], {}, special)
            assert total.item() == expected[0], response
            seen.add((added, expected[0]))
    assert {("<|audio_eos|>", 2.0), ("[noise]", 2.0), (END, 0.0)} <= seen
    assert rewards.extract_response(f"{PROMPT}<|fim_prefix|>dog", special) == "<|fim_prefix|>dog"


def test_a_perfect_answer_scores_two_through_the_trainers_call():
    queries = [
        f"{PROMPT}<answer>dog</answer>{END}{PAD}{PAD}",  # perfect
        f"{PROMPT}dog{END}",  # right, no tags
        f"{PROMPT}<answer>cat</answer>{END}",  # the form alone
        f"{PROMPT}cat{END}\n{HEADER}<answer>dog</answer>{END}",  # an imitated second turn
        f"{PROMPT}<think>hm</think><answer>dog</answer>{END}",  # think sample
        f"{PROMPT}<answer>dog</answer>{END}",  # think sample without thinking
    ]
    labels = ["avqa_rule"] * 4 + ["avqa_think_rule"] * 2
    total, metrics = rewards.reward_fn(
        model_reward_list=[], labels=labels, queries=queries, refs=["dog"] * 6, label_map={}
    )
    torch.testing.assert_close(total, torch.tensor([2.0, 1.0, 1.0, 0.0, 2.0, 1.0]))
    assert all(tensor.is_contiguous() for tensor in (total, *metrics.values()))
    assert set(metrics) == {"format_reward", "accuracy_reward", "rule_reward"}
    torch.testing.assert_close(metrics["accuracy_reward"], torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(metrics["format_reward"], torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(metrics["rule_reward"], total)


def test_metrics_share_no_memory():
    """LightRFT adds penalties to the rewards in place; the metrics must stay."""
    total, metrics = rewards.reward_fn([], ["avqa_rule"], [PROMPT + "<answer>dog</answer>"], ["dog"], {})
    total -= 5.0
    assert [metrics[name].item() for name in ("rule_reward", "accuracy_reward", "format_reward")] == [2.0, 1.0, 1.0]


def test_rewards_live_on_the_device_of_the_model_scores():
    meta = torch.zeros(1, device="meta")
    total, metrics = rewards.reward_fn([meta], ["avqa_rule"], [PROMPT + "dog"], ["dog"], {"rm": 0})
    assert {tensor.device.type for tensor in (total, *metrics.values())} == {"meta"}
    total, metrics = rewards.reward_fn([], [], [], [], {})
    assert {(tuple(tensor.shape), tensor.dtype) for tensor in (total, *metrics.values())} == {((0,), torch.float32)}


def test_an_unknown_label_means_the_plain_rule_and_is_warned_of_once(caplog):
    query = PROMPT + "<answer>dog</answer>"
    with caplog.at_level(logging.WARNING):
        for labels in (["mystery"] * 2, ["mystery", "avqa_rule"], ["avqa_think_rule"] * 2, None):
            total, _ = rewards.reward_fn([], labels, [query] * 2, ["dog"] * 2, {})
            assert total.tolist() == ([1.0, 1.0] if labels == ["avqa_think_rule"] * 2 else [2.0, 2.0])
    warned = [record.message.split(":")[0] for record in caplog.records]
    assert warned == ["unknown label 'mystery'", "unknown label 'None'"]


def test_a_query_without_a_header_is_a_response_and_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        total, _ = rewards.reward_fn([], ["avqa_rule"] * 2, ["<answer>dog</answer><|im_end|>"] * 2, ["dog"] * 2, {})
    assert total.tolist() == [2.0, 2.0]
    assert len(caplog.records) == 1 and "no assistant header" in caplog.text


@pytest.mark.parametrize("empty", ["", " \n", "<answer></answer>", None, 4])
def test_an_absent_reference_is_an_error_that_names_the_sample(empty):
    with pytest.raises(ValueError, match=r"sample 1 \(label 'avqa_think_rule'\): the reference must be"):
        rewards.reward_fn([], ["avqa_rule", "avqa_think_rule"], [PROMPT, PROMPT], ["dog", empty], {})


def test_the_format_rule_takes_linear_time():
    text = "<think>" + "</think><answer>" * 65_536 + "</answer>x</answer"
    begin = time.process_time()
    assert rewards.format_reward_fn(text, enable_think=True) == 0.0
    assert time.process_time() - begin < 1.0  # the pattern it restates tries every pair of borders


def test_a_check_ends_with_its_share_of_cpu_time():
    """math_verify's own limit is 5 s a step, and does not end one step in C."""
    brief = MathChecker(cpu_limit_s=0.5)
    brief.agree("$1$", "$2$")  # starting it is not on the clock
    begin = time.monotonic()
    assert not brief.agree("it is 9**9**9**9", "<answer>$3$</answer>")
    assert time.monotonic() - begin < 4.5
    brief.close()


def test_the_worker_survives_hang_and_interruption(checker, monkeypatch):
    assert checker.agree("$1/2$", "$0.5$") and not checker.agree("$1/3$", "$0.5$")
    with monkeypatch.context() as patch:
        patch.setattr(matching, "CHECK_WALL_LIMIT_S", 0.3)
        os.kill(checker._process.pid, signal.SIGSTOP)  # neither reads nor answers
        assert not checker.agree("$1/2$", "$0.5$")

    def interrupted(*_):
        raise KeyboardInterrupt

    assert checker.agree("$1/2$", "$0.5$")
    with monkeypatch.context() as patch:
        patch.setattr(matching, "_read_byte", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checker.agree("$1/2$", "$0.5$")
    assert not checker.agree("$1/3$", "$0.5$"), "the reply to the interrupted check was taken for this one's"


def test_without_math_verify_text_counts_and_a_warning_is_given(monkeypatch, caplog, tmp_path):
    absent = MathChecker(worker_file=str(tmp_path / "absent.py"))
    with pytest.raises(MathCheckUnavailable, match="ended while starting"):
        absent.agree("$1$", "$2$")
    begin = time.monotonic()
    monkeypatch.setattr(matching, "_CHECKER", absent)
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            assert rewards.accuracy_reward_fn("it is $0.125$", "$1/8$") == 0.0
            assert rewards.accuracy_reward_fn("<answer>$1/8$</answer>", "$1/8$") == 1.0
    assert len(caplog.records) == 1 and "compared as text only" in caplog.text
    assert time.monotonic() - begin < 1.0, "a failed start is not repeated for every sample"
    monkeypatch.undo()
    assert rewards.accuracy_reward_fn("it is $0.125$", "$1/8$") == 1.0, (
        "an answer that was never checked was remembered"
    )


LIFE = textwrap.dedent(
    """
    import os, sys, time
    from aqa.rewards import matching as matching

    end = sys.argv[1]
    assert matching.answers_agree("$1/2$", "$0.5$")
    worker = matching._CHECKER._process.pid
    libraries = open(f"/proc/{worker}/maps").read()
    assert "libtorch" not in libraries and "libcuda" not in libraries
    pipe = os.dup(matching._CHECKER._process.stdin.fileno())  # a fork inherits what Python does not know of, too
    child = os.fork()
    if child == 0:
        assert matching._CHECKER._process is None
        if end == "killed":
            os.closerange(1, 3)  # the test reads output and errors to their end
            time.sleep(20)  # a fork that outlives its parent
            os._exit(0)
        agreed = matching.answers_agree("$1/4$", "$0.25$") and matching._CHECKER._process.pid != worker
        matching._CHECKER.close()
        os._exit(0 if agreed else 1)
    if end == "exit":
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert matching._CHECKER._process.poll() is None, "the child ended its parent's worker"
        assert matching.answers_agree("$1/5$", "$0.2$")
    print(worker, child, flush=True)
    if end == "killed":
        os.kill(os.getpid(), 9)
    """
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("end", ["exit", "killed"])
def test_no_worker_outlives_its_parent_and_a_fork_gets_its_own(end):
    done = run_code(LIFE, end, check=False)
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0)
    worker, child = map(int, done.stdout.split())
    try:
        wait_until_gone(worker)
    finally:
        if end == "killed":
            os.kill(child, signal.SIGKILL)


def test_labels_that_do_not_fit_are_told():
    plain, think = "Output the final answer in <answer>", "Output the thinking process in <think> </think> and"
    assert rewards.label_doubts([plain, think], [rewards.PLAIN_LABEL, rewards.THINK_LABEL]) == []
    prompts = [plain, think, plain, think, plain, plain]
    labels = ["avqa", rewards.PLAIN_LABEL, rewards.THINK_LABEL, None, rewards.THINK_LABEL, rewards.PLAIN_LABEL]
    first, second, third = rewards.label_doubts(prompts, labels)
    assert first.startswith("2 of 6 rows have a label that names no rule") and "(row 0: label 'avqa')" in first
    assert second.startswith("2 of 6 rows are labelled avqa_think_rule") and "(row 2: " in second
    assert third.startswith("2 of 6 rows have prompts that say <think>") and "(row 1: " in third


# ---- further rewards, chosen by name with --reward
def pay(name, response, reference="2 dogs", label="avqa_rule"):
    return find_reward(name)([], [label], [f"{HEADER}{response}<|im_end|>"], [reference], {})


@pytest.mark.parametrize(
    ("name", "response", "label", "reward"),
    [
        ("exact", "<answer>2 dogs</answer>", "avqa_rule", 2.0),
        ("exact", "<answer>2 cats</answer>", "avqa_rule", 1.0),
        ("exact", "2 dogs", "avqa_rule", 1.0),
        ("graded_format", "<answer>2 dogs</answer>", "avqa_rule", 2.0),
        ("graded_format", "it is <answer>2 dogs</answer>", "avqa_rule", 1.5),  # both tags, not the whole response
        ("graded_format", "<answer>bird", "avqa_rule", 0.25),
        ("graded_format", "<answer><answer>bird", "avqa_rule", 0.0),
        ("graded_format", "<think>hm</think> so <answer>2 dogs</answer>", "avqa_think_rule", 1.5),
        ("graded_format", "<think>hm <answer>bird</answer>", "avqa_think_rule", 0.375),  # 3 tags of 4
        ("graded_format", "<think>hm</think><answer>2 dogs</answer>", "avqa_think_rule", 2.0),
        ("length_aware", f"<think>{'a ' * 62}</think><answer>2 dogs</answer>", "avqa_think_rule", 2.0),  # 64 words
        ("length_aware", f"<think>{'a ' * 94}</think><answer>2 dogs</answer>", "avqa_think_rule", 1.75),  # 96
        # 1,900 characters without a space are 95 words, and dogs</answer> is one
        ("length_aware", f"<think>{'a' * 1876}</think><answer>2 dogs</answer>", "avqa_think_rule", 1.75),
        ("length_aware", f"<think>{'a ' * 999}</think><answer>2 dogs</answer>", "avqa_think_rule", 1.5),
    ],
)
def test_rewards_by_hand(name, response, label, reward):
    assert pay(name, response, label=label)[0].tolist() == [reward]


def test_a_sum_of_rewards_by_hand(own):
    choices = ["a dog", "dog", "cat"]
    prompt = f"<|im_start|>user\n{render_prompt('What is it?', choices, True)}<|im_end|>\n{HEADER}"
    texts = [
        # of "a dog" and "dog", which end at the same place, the longer one is what was named
        "<think>A cat? No, a DOG it is.</think><answer>a dog</answer>",
        "<think>a dog</think><answer>dog</answer>",  # right, and not what was thought
        "<think>cat, dog, cat</think><answer>cat</answer>",
        "<think>concatenate</think><answer>cat</answer>",  # "cat" inside a word
        "dog",  # no thinking, no form, no answer
        "<think>a dog</think><answer>the dog</answer>",  # none of the choices
    ]
    name, weights = "accuracy+format+consistency+length+majority+my_rewards:shout", [1, 0.5, 2, 1, 1, 1]
    pay = find_reward(f"audio_gain+{name}", [9, *weights], words=(2, 4), group=6)  # the trainer adds audio_gain
    total, metrics = pay([], ["avqa_think_rule"] * 6, [f"{prompt}{text}<|im_end|>" for text in texts], ["dog"] * 6, {})
    expected = {
        "accuracy_reward": [0, 1, 0, 0, 1, 0],
        "format_reward": [1, 1, 1, 1, 0, 1],
        "consistency_reward": [1, 0, 1, 0, 0, 0],
        # 8 3 4 3 1 4 words, of which one of 21 to 40 characters counts as two
        "length_reward": [0, 1, 1, 1, 0.5, 1],
        "majority_reward": [0, 0, 1, 1, 0, 0],  # cat twice; all others once
        "shout_reward": [0] * 6,
    }
    found = {metric: values.tolist() for metric, values in metrics.items() if metric in expected}
    assert found == expected
    sums = [sum(w * v[i] for w, v in zip(weights, expected.values(), strict=True)) for i in range(6)]
    assert total.tolist() == sums == metrics["rule_reward"].tolist()
    right = f"{prompt}<think>a</think><answer>dog</answer><|im_end|>"
    for alone, weight, paid in (
        ("accuracy", None, 1.0),
        ("format", [2.0], 2.0),
        ("exact", [3.0], 6.0),
        ("r1_aqa+audio_gain", None, 2.0),
    ):
        assert find_reward(alone, weight)([], ["avqa_think_rule"], [right], ["dog"], {})[0].tolist() == [paid]


def test_what_is_right_in_a_sum_is_what_its_part_takes_for_right():
    """math_verify takes "about 2 cats" for "some 2 dogs", which is what exact is for; audio_gain goes by it."""
    query = f"<|im_start|>user\nHow many?<|im_end|>\n{HEADER}<answer>about 2 cats</answer><|im_end|>"
    for name, right in (("exact+audio_gain", 0.0), ("exact+accuracy+audio_gain", 1.0), ("format+length", 1.0)):
        _, metrics = find_reward(name)([], ["avqa_rule"], [query], ["some 2 dogs"], {})
        assert metrics["accuracy_reward"].tolist() == [right]


@pytest.mark.parametrize(
    ("answers", "paid"),
    [
        ("aab", [1, 1, 0]),
        ("aabb", [0, 0, 0, 0]),  # a tie
        ("a--", [1, 0, 0]),  # an answer that is missing has no vote
        ("---", [0, 0, 0]),
        ("aab" + "bba", [1, 1, 0, 1, 1, 0]),  # two prompts of one wording: groups are cut at their size
    ],
)
def test_the_most_frequent_answer_is_paid(answers, paid):
    texts = [f"{HEADER}<answer>{answer.strip('-')}</answer><|im_end|>" for answer in answers]
    pay = find_reward("majority", group=4 if len(answers) == 4 else 3)
    assert pay([], None, texts, ["never read"] * len(texts), {})[0].tolist() == paid


def test_consistency_wants_data_that_ask_for_the_thinking():
    with pytest.raises(ValueError, match=r"avqa\.py --enable_think"):
        find_reward("accuracy+consistency")([], ["avqa_rule"], [f"{HEADER}<answer>dog</answer>"], ["dog"], {})


SOUNDS = ["(A) rain", "(B) beep", "(C) 3"]
ASKED = f"<|im_start|>user\n<|AUDIO|>{render_prompt('What is it?', SOUNDS, False)}<|im_end|>\n{HEADER}"


@pytest.mark.parametrize(
    ("said", "prompt", "accuracy"),
    [
        ("(B) beep", ASKED, 1),  # the reference itself
        ("beep", ASKED, 1),
        ("B", ASKED, 1),
        ("**B.**", ASKED, 1),
        ("rain", ASKED, 0),  # names another choice
        ("(A) beep", ASKED, 0),  # contradicts itself
        ("B or A", ASKED, 0),
        ("(b): **beep**.", ASKED, 1),
        *((said, ASKED, 0) for said in ("not beep", "The answer is not the beep", "beep beep, no idea")),
        ("beep or rain", ASKED, 0),
        *((said, ASKED, 0) for said in ("(B) not beep", "B) beep, not", "The wrong answer is: beep", "no option B")),
        ("", ASKED, 0),
        ("beep", HEADER, 0),  # a prompt of other words: which choices there are is not known
    ],
)
def test_an_answer_that_names_the_right_choice_is_the_gold_answer(said, prompt, accuracy):
    """To all rewards by name; R1-AQA's own rule compares strings."""
    query = f"{prompt}<answer>{said}</answer><|im_end|>"
    for name in ("r1_aqa", *NAMED):
        total, metrics = find_reward(name)([], ["avqa_rule"], [query], ["(B) beep"], {})
        literal = float(said == "(B) beep")
        assert total.tolist() == [1 + (literal if name == "r1_aqa" else accuracy)], name
        assert metrics["accuracy_reward"].tolist() == [total.item() - 1], name  # what --keep_best compares


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        (render_prompt("q?", [3, None, "it's", "]. Output it"], True), ["3", "None", "it's", "]. Output it"]),
        (render_prompt("q?", [], False), None),
        ("Please choose the answer from the following options: [a, b]. Output the final answer", None),
        ("Please choose the answer from the following options: __import__('os'). Output the final answer", None),
        ("Which one?", None),
    ],
)  # fmt: skip
def test_choices_are_read_from_the_prompt(prompt, choices):
    assert choices_in(prompt) == choices


@pytest.mark.parametrize(("name", "paid", "accuracy"), [("exact", 1.0, 0.0), ("my_rewards:integer", 2.0, 1.0)])
def test_accuracy_is_what_is_paid_or_for_a_reward_of_ones_own_r1_aqas(own, name, paid, accuracy):
    total, metrics = pay(name, "<answer>about 2 cats</answer>", "some 2 dogs")  # math_verify sees two twos
    assert total.tolist() == [paid]
    assert metrics["accuracy_reward"].tolist() == [accuracy] and metrics["format_reward"].tolist() == [1.0]
    assert torch.equal(metrics["rule_reward"], total)


@pytest.mark.parametrize("name", ["r1_aqa", *NAMED])
def test_no_reward_takes_an_empty_or_a_missing_reference(name):
    with pytest.raises(ValueError, match=r"sample 0 .*must be a text that is not empty"):
        pay(name, "<answer></answer>", "<answer></answer>")
    for references in ([], ["dog"] * 2):
        with pytest.raises(ValueError, match="every query needs one reference"):
            find_reward(name)([], None, ["dog"], references, {})


def test_r1_aqas_is_the_default_and_the_names_are_those_of_the_flag():
    assert find_reward("r1_aqa") is rewards.reward_fn
    assert {"r1_aqa", *NAMED} == set(REWARDS)


@pytest.mark.parametrize("module", ["report", "doctor", "statistics", "package.report"])
def test_a_module_of_ones_own_may_have_any_name(tmp_path, module):
    """In a process of its own, started as train_colocate.py is: the example's folder is the first on sys.path."""
    path = (tmp_path / module.replace(".", "/")).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text("import sibling\n\ndef pay(response, reference, think):\n    return sibling.PAY\n")
    (tmp_path / "sibling.py").write_text("from doctor import PAY\n" if module != "doctor" else "PAY = 7\n")
    (tmp_path / "doctor.py").open("a").write("PAY = 7\n")  # named as a script of the example
    program = (
        "import sys; from aqa.rewards.named import find_reward\n"
        f"print(find_reward('{module}:pay')([], None, ['x'], ['y'], {{}})[0].item())\n"
        "import report, statistics; print(report.main.__module__, statistics.mean([3]), sys.path[0])"
    )
    shown = run_code(program, cwd=tmp_path, PYTHONSAFEPATH=1).stdout
    assert shown.splitlines() == ["7.0", f"report 3 {EXAMPLE}"]


OWN = """
import sys, time
from decimal import Decimal
import numpy as np, torch

VALUES = {
    "shout": lambda response: 3.5 if response.isupper() else 0,
    "numpy": lambda _: np.float32(0.25), "integer": lambda _: np.int64(2), "array": lambda _: np.array(1.5),
    "tensor": lambda _: torch.tensor(0.5, requires_grad=True), "flag": lambda _: np.True_,
    "decimal": lambda _: Decimal("0.75"),
    "nan": lambda _: float("nan"), "huge": lambda _: 1e39, "endless": lambda _: 10**400, "none": lambda _: None,
    "text": lambda _: "1.0", "list": lambda _: [1.0], "vector": lambda _: torch.ones(1), "complex": lambda _: 1j,
    "complex_tensor": lambda _: torch.tensor(1j), "exits": lambda _: sys.exit(0), "stops": lambda _: interrupt(),
    "loud": lambda _: print("x" * 1_500) or print("y" * 1_500, file=sys.stderr) or 1.0,
    "raises": lambda _: {}["gone"],
}
LIMIT = 3

def interrupt():
    raise KeyboardInterrupt

def __getattr__(name):
    return lambda response, reference, think: VALUES[name](response)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(OWN)
    (tmp_path / "leaves.py").write_text("import sys\n\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "number"),
    {"shout": 3.5, "numpy": 0.25, "integer": 2, "array": 1.5, "tensor": 0.5, "flag": 1, "decimal": 0.75}.items(),
)
def test_a_reward_of_ones_own_returns_any_kind_of_number(own, name, number):
    assert pay(f"my_rewards:{name}", "DOGS")[0].tolist() == [number]


NO_NUMBERS = {"nan": "returned nan", "huge": "returned 1e+39", "endless": "returned 1000", "none": "returned None"}
NO_NUMBERS |= {"text": "returned '1.0'", "list": "returned [1.0]", "vector": "returned tensor([1.])"}
NO_NUMBERS |= {"complex": "returned 1j", "complex_tensor": "returned tensor(0.+1.j)"}
NO_NUMBERS |= {"exits": "ended with SystemExit(0)", "stops": "ended with KeyboardInterrupt()"}


@pytest.mark.parametrize(("name", "what"), NO_NUMBERS.items())
def test_a_reward_without_a_number_is_named_with_its_sample(own, name, what):
    before = signal.signal(signal.SIGINT, lambda *_: None)  # as while training, where Ctrl-C raises nothing
    try:
        with pytest.raises(RewardError) as caught:
            pay(f"my_rewards:{name}", "a DOG", "2 dogs")
    finally:
        signal.signal(signal.SIGINT, before)
    assert str(caught.value).startswith(f"--reward my_rewards:{name}: {what}")
    assert "'a DOG' (answer '2 dogs')" in str(caught.value)


def test_a_reward_that_raises_keeps_its_traceback_and_gets_a_note(own):
    with pytest.raises(KeyError, match="gone") as caught:
        pay("my_rewards:raises", "dogs")
    assert caught.value.__notes__ == ["raised by --reward my_rewards:raises for the response 'dogs' (answer '2 dogs')"]
    with pytest.raises(KeyboardInterrupt):  # which is Ctrl-C where nobody has taken it over
        pay("my_rewards:stops", "dogs")


def test_what_a_reward_prints_is_limited_per_batch(own, capsys):
    texts = [f"{HEADER}dogs"] * 8
    for _ in range(2):
        find_reward("my_rewards:loud")([], None, texts, ["dogs"] * 8, {})
        shown = capsys.readouterr()
        left_out = 2 * (8 * 1_501 - 2_000)
        assert len(shown.err) == 2_000
        assert shown.out[2_000:] == f"\n... and {left_out} characters more by --reward my_rewards:loud, left out\n"


def test_a_reward_that_cannot_be_imported_is_named(own):
    for name in ("my_rewards:LIMIT", "nowhere_to_be_found:shout", "re:gone", "leaves:pay"):
        with pytest.raises(SystemExit, match=re.escape(f"--reward {name}: ")):
            find_reward(name)
