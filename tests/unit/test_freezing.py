"""Parts of the model that are not to train, by name."""

import pytest
import torch
from torch import nn

from aqa.training.freezing import freeze


@pytest.fixture
def model():
    """Two blocks of 6 values each beside a tower of 20 and a head of 12."""
    blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(2, 2)}) for _ in range(2)])
    return nn.ModuleDict({"tower": nn.Linear(4, 4), "lm": nn.ModuleDict({"layers": blocks}), "head": nn.Linear(3, 3)})


@pytest.mark.parametrize(
    ("parts", "frozen"),
    [
        (["tower"], {"tower.weight", "tower.bias"}),
        (["layers.0"], {"lm.layers.0.fc.weight", "lm.layers.0.fc.bias"}),
        (["lm.layers.?.fc"], {f"lm.layers.{i}.fc.{kind}" for i in (0, 1) for kind in ("weight", "bias")}),
        (["layers.[1-9]", "h*"], {"lm.layers.1.fc.weight", "lm.layers.1.fc.bias", "head.weight", "head.bias"}),
    ],
)
def test_parts_are_found_by_name(model, parts, frozen):
    freeze(model, parts)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


def test_counts(model):
    with torch.no_grad():
        said = freeze(model, ["tower"])
    assert said == (
        "frozen: tower (2 tensors, 0.000 M); 0.000 M of 0.000 M parameters train (54.55%)"  # (12 + 12) of 44
    )


def test_a_head_beside_the_language_model_belongs_to_it(model):
    """As transformers 5 has it, and no checkpoint."""
    freeze(model, ["lm"], lambda name: f"lm.{name}" if name.startswith("head.") else name)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "tower.weight",
        "tower.bias",
    }


@pytest.mark.parametrize("part", ["towe", "layers.2", "weight", "fc.layers"])
def test_a_part_that_is_not_there_is_refused(model, part):
    with pytest.raises(SystemExit, match=f"--freeze_prefix {part}: the model has no parameter"):
        freeze(model, ["tower", part])


def test_something_must_train(model):
    with pytest.raises(SystemExit, match="--freeze_prefix tower lm head: nothing is left that trains"):
        freeze(model, ["tower", "lm", "head"])
