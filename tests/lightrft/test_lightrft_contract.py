"""The contract with LightRFT: each kind of difference is named, and the table holds on the real checkout."""

import importlib
import inspect
import sys
import textwrap

import pytest

from aqa.families import Qwen2Audio
from aqa.hosts.lightrft import audio, contract
from aqa.hosts.lightrft.contract import CONTRACT, find_violations, read_table
from aqa.patches.experience_maker import check_audio
from aqa.patches.multimodal_processor import AudioMultimodalProcessor, count_audio
from aqa.patches.strategy import build_audio_inputs
from aqa.rewards.r1_aqa import reward_fn

FITTING = """
class Strategy:
    def __init__(self, engine):
        self.engine = engine
    def build(self, prompts, images, images_num): ...
    @staticmethod
    def count(images): ...
    def generate(self, prompts, images):
        if images:
            return self.build(prompts=prompts, images=images, images_num=1)
    def save(self, *args, **kwargs): ...
    def share(self, **more):
        return self.build(**more)
def make(args, kind=None): ...
"""
TABLE = """
other_host.strategy
    make(args, /, kind) | makes it

other_host.strategy:Strategy
    engine | asked for rollouts
    build(prompts, images, images_num=None) < generate | replaced: audio
    count(images, /) | counts clips
    save(model, folder, /, **_) | wrapped
    share -> build(prompts, images) | replaced: audio
"""


@pytest.fixture
def violations(tmp_path, monkeypatch):
    """What is said about a module in which one piece of the fitting source is replaced by another."""
    (tmp_path / "other_host").mkdir()
    (tmp_path / "other_host" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def of(old: str, new: str, table: str = TABLE) -> list[str]:
        assert old in FITTING
        source = FITTING.replace(old, textwrap.dedent(new))
        (tmp_path / "other_host" / "strategy.py").write_text(source, encoding="utf-8")
        importlib.invalidate_caches()
        return find_violations(read_table(table))

    yield of
    for name in ("other_host", "other_host.strategy"):
        sys.modules.pop(name, None)


MAKE = "make: expected (args, /, kind); found "
BUILD = "Strategy.generate: expected to call build(prompts, images, images_num=None); found "
IMPORT = "expected to be importable; found "
ABSENT = "ModuleNotFoundError: No module named 'no_such_package'; install what LightRFT's requirements.txt lists"
DIFFERENCES = (  # what stands in the fitting source, what comes in its place, what is said
    ("engine", "engine", None),
    ("kind=None", "kind=None, *, more=0, **rest", None),
    ("images_num): ...", "images_num, more=0): ...", None),  # which nobody passes
    ("def make(args", "def build_it(args", MAKE + "nothing"),
    ("make(args, kind", "make(args, sort", MAKE + "(args, sort=None)"),
    ("make(args, kind=None", "make(args, **kind", MAKE + "(args, **kind)"),
    ("make(args, kind=None", "make(kind, args", MAKE + "(kind, args)"),
    ("make(args, kind=None", "make(args, kind, seed", MAKE + "(args, kind, seed)"),
    ("def make(args, kind=None): ...", "make = 1", MAKE + "1, which cannot be called"),
    ("count(images)", "count(self, images)", "Strategy.count: expected (images, /); found (self, images)"),
    ("self.engine = ", "self.motor = ", "Strategy.engine: expected to exist; found nothing"),
    ("class Strategy", "class Plan", "Strategy: expected a class; found none"),
    # as in LightRFT's pull request 58
    ("images_num=1)", "images_num=1, all_audios=0)", BUILD + "the keyword all_audios, which ours does not take"),
    ("images=images, images_num", "images_num", BUILD + "no images, which ours requires"),
    ("prompts=prompts, images=images, images_num=1", "1, 2, 3, 4", BUILD + "4 arguments by position"),
    ("self.build(prompts=", "self.ask(prompts=", BUILD + "no such call"),
    ("def generate", "def roll_out", BUILD + "nothing"),
    ("class Strategy:", "import no_such_package\nclass Strategy:", IMPORT + ABSENT),
    ("class Strategy:", "class Strategy(:", IMPORT + "SyntaxError: invalid syntax"),
)


@pytest.mark.parametrize(("old", "new", "expected"), DIFFERENCES)
def test_each_kind_of_difference_is_named(violations, old, new, expected):
    found = violations(old, new)
    assert len(found) == (expected is not None), found
    for entry in found:
        path = "other_host.strategy: " if expected.startswith(IMPORT) else "other_host.strategy."
        assert entry.startswith(path + expected)


def test_one_message_names_every_difference_and_what_it_is_for(violations, monkeypatch):
    table = TABLE.replace("make(args", "produce(args").replace("count(images", "count(clips")
    violations("engine", "engine")
    monkeypatch.setattr(contract, "CONTRACT", read_table(table))
    with pytest.raises(SystemExit) as stop:
        contract.check_contract("other_host.strategy")
    first, *listed, last = str(stop.value).split("\n")
    assert first.startswith("LightRFT differs from the one tested, 0.1.1 at commit 49e62cb, in 2 places")
    assert listed == [
        "  - other_host.strategy.produce: expected (args, /, kind); found nothing; here: makes it",
        "  - other_host.strategy.Strategy.count: expected (clips, /); found (images); here: counts clips",
    ]
    assert "49e62cb" in last
    assert contract.check_contract("another_package") is None  # nothing of the table is in there


REPLACEMENTS = {
    "_build_multimodal_inputs": build_audio_inputs,
    "engine_generate_local": audio.generate_with_audio,  # bound to the strategy
    "_map_weight_name_for_sglang": Qwen2Audio.checkpoint_name,
    "normalize_images": check_audio,
    "get_images_num": count_audio,
    "process_multimodal_batch": AudioMultimodalProcessor.process_multimodal_batch,
    "reward_fn": reward_fn,
    "forward": audio.audio_forward,
    "actor": audio.audio_forward,
    "initial_model": audio.audio_forward,
}


@pytest.mark.parametrize("spot", [spot for spot in CONTRACT if spot.name in REPLACEMENTS], ids=lambda spot: spot.name)
def test_the_table_has_the_parameters_of_our_replacements(spot):
    ours = list(inspect.signature(REPLACEMENTS[spot.name]).parameters.values())
    ours = [p for p in ours if p.name not in ("self", "actor", "strategy", "special", "seconds")]
    table = list(inspect.signature(eval(f"lambda {spot.parameters}: None")).parameters.values())
    assert {p.name: p.default for p in table} == {p.name: p.default for p in ours}
