"""Rewards by name. R1-AQA's own rule is tested in test_rewards."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLE, ROOT

from aqa.rewards.named import NAMED, find_reward
from aqa.rewards.r1_aqa import reward_fn
from aqa.training.flags import REWARDS

HEADER = "<|im_start|>assistant\n"


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


def test_what_r1_aqa_counts_is_measured_whatever_is_paid():
    total, metrics = pay("exact", "<answer>about 2 cats</answer>", "some 2 dogs")  # math_verify sees two twos
    assert total.tolist() == [1.0]
    assert metrics["accuracy_reward"].tolist() == [1.0] and metrics["format_reward"].tolist() == [1.0]
    assert torch.equal(metrics["rule_reward"], total)


def test_r1_aqas_is_the_default_and_the_names_are_those_of_the_flag():
    assert find_reward("r1_aqa") is reward_fn
    assert {"r1_aqa", *NAMED} == set(REWARDS)


@pytest.mark.parametrize("module", ["rewards", "report", "planner", "doctor", "statistics", "package.report"])
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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE), str(ROOT / "runtime")])}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["7.0", f"report 3 {EXAMPLE}"]


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def shout(response, reference, think):\n    return 3.5 if response.isupper() else 0\n"
        "def broken(response, reference, think):\n    return float('nan')\n"
        "LIMIT = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert pay("my_rewards:shout", "DOGS")[0].tolist() == [3.5]
    assert pay("my_rewards:shout", "dogs")[0].tolist() == [0.0]
    with pytest.raises(ValueError, match="must return a finite number, not nan, for 'dogs'"):
        pay("my_rewards:broken", "dogs")
    for name in ("my_rewards:gone", "nowhere_to_be_found:shout", "my_rewards:LIMIT"):
        with pytest.raises(SystemExit, match=re.escape(f"--reward {name}: ")):
            find_reward(name)
