"""Several sources: columns that fit together, constant shares, shares that move, and what rows are counted under."""

from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aqa.data.columns import MOST_TAGS, tags_of
from aqa.data.mixing import SOURCE_COLUMN, describe_mix, drifting_order, mix, mix_drifting, read_sources

STRATEGY = SimpleNamespace(world_size=1, print=lambda *_: None)


def write(folder, name, rows, **columns):
    path = folder / name / "train.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"name": [f"{name}{i}" for i in range(rows)], **columns}), path)
    return path.parent


def read(*folders, needed=("name",)):
    return read_sources(",".join(map(str, folders)), "train", STRATEGY, 0, needed)


def test_columns_are_made_to_fit(tmp_path):
    """An old file without question types, and a newer one whose ids are texts."""
    old = write(tmp_path, "old", 2, extra=[{"id": 1}, {"id": 2}])
    new = write(tmp_path, "new", 2, extra=[{"id": "x"}, {"id": "y"}], question_type=["Why", "When"])
    rows = mix_drifting(read(old, new), [1, 0], [0, 1], 99, 0)
    assert sorted(rows.column_names) == ["name", SOURCE_COLUMN, "question_type"]
    found = {name: (source, kind) for name, source, kind in zip(*(rows[c] for c in rows.column_names), strict=True)}
    assert found["old0"] == ("old", None) and found["new1"] == ("new", "When")


def test_a_needed_column_is_cast_or_refused(tmp_path):
    first = write(tmp_path, "a", 2, reference=["x", "y"])
    large = write(tmp_path, "b", 1, reference=pa.array(["z"], pa.large_string()))
    assert list(mix_drifting(read(first, large, needed=("reference",)), [0, 1], [0, 1], 1, 0)["reference"]) == ["z"]
    nested = write(tmp_path, "c", 1, reference=[{"text": "z"}])
    with pytest.raises(SystemExit, match="c: column 'reference' cannot be cast to its type in a"):
        read(first, nested, needed=("reference",))


def test_one_source_is_left_as_it_is(tmp_path):
    (only,) = read(write(tmp_path, "a", 3))
    assert mix([only], [1.0], 0).column_names == ["name"]


def test_sources_of_one_name_are_told_apart(tmp_path):
    folders = (write(tmp_path / "x", "a", 1), write(tmp_path / "y", "a", 1))
    assert [part[SOURCE_COLUMN][0] for part in read(*folders)] == [str(folder) for folder in folders]


def test_constant_shares(tmp_path):
    parts = read(write(tmp_path, "a", 2000), write(tmp_path, "b", 2000))
    rows = mix(parts, [0.7, 0.3], seed=3)
    counts = Counter(rows[SOURCE_COLUMN])
    # a is used up after about 2000 / 0.7 rows; three standard deviations of b's count, 857, are 105
    assert counts["a"] == 2000 and abs(counts["b"] - 857) < 105
    assert list(mix(parts, [0.7, 0.3], seed=3)["name"]) == list(rows["name"])
    assert list(mix(parts, [0.7, 0.3], seed=4)["name"]) != list(rows["name"])
    shares = f"a {2000 / len(rows):.1%}, b {counts['b'] / len(rows):.1%}"
    assert describe_mix(rows) == f"mix       {len(rows)} rows: {shares}"


def test_a_curriculum_by_hand():
    """Five places, shares of the first source 1, 3/4, 1/2, 1/4, 0: sums 1, 1.75, 2.25, 2.5, 2.5."""
    order = drifting_order([10, 10], [1, 0], [0, 1], 5, seed=0)
    sources = [row // 10 for row in order]
    # behind: (1, 0) a; (.75, .25) a; (.25, .75) b; (.5, .5) a, the first of equals; (-.5, .5 + 1) b
    assert sources == [0, 0, 1, 0, 1]
    assert order == drifting_order([10, 10], [1, 0], [0, 1], 5, seed=0)


@pytest.mark.parametrize(("start", "end"), [([0.9, 0.1], [0.2, 0.8]), ([0.5, 0.3, 0.2], [0.1, 0.1, 0.8])])
def test_a_curriculum_holds_its_shares_everywhere(start, end):
    rows, size = 1000, 400
    order = drifting_order([size] * len(start), start, end, rows, seed=1)
    wanted = [0.0] * len(start)
    counts = [0] * len(start)
    for place, row in enumerate(order):
        t = place / (rows - 1)
        wanted = [w + (1 - t) * a + t * b for w, a, b in zip(wanted, start, end, strict=True)]
        counts[row // size] += 1
        assert all(abs(w - c) < 2 for w, c in zip(wanted, counts, strict=True))
    for source in range(len(start)):  # a source is used up before any of its rows comes again
        mine = [row for row in order if row // size == source]
        assert len(set(mine[:size])) == min(size, len(mine))
        if len(mine) > size:
            assert mine[: len(mine) - size] != mine[size:]  # and then in another order


def test_a_curriculum_is_at_most_as_long_as_asked_for(tmp_path):
    parts = read(write(tmp_path, "a", 6), write(tmp_path, "b", 2))
    assert len(mix_drifting(parts, [0.5, 0.5], [0.5, 0.5], 1_000, 0)) == 8
    assert Counter(mix_drifting(parts, [0.5, 0.5], [0.5, 0.5], 4, 0)[SOURCE_COLUMN]) == {"a": 2, "b": 2}


def test_tags():
    columns = {SOURCE_COLUMN: ["x", "y", "x"], "dataset_name": ["AVQA"] * 3, "question_type": ["Why", "", None]}
    assert tags_of(columns, ["r", "s", "s"]) == [
        ("source/x", "label/r"),
        ("source/y", "label/s"),
        ("source/x", "label/s"),
    ]  # of one data set and one type there is nothing to tell apart
    many = [str(i) for i in range(MOST_TAGS + 1)]
    assert tags_of({"question_type": many}, ["r"] * len(many)) == [()] * len(many)
    assert tags_of({"name": ["old"]}, ["r"]) == [()]
