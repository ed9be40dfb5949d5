"""Reading prompt data."""

from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
from datasets import Dataset, interleave_datasets

from lightrft.utils.distributed import check_same, digest

_SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")


def _read(path: Path) -> Dataset:
    """One file as a dataset, read afresh: no cache that could be stale."""
    if path.suffix == ".parquet":
        return Dataset(pq.read_table(path))
    if path.suffix == ".csv":
        return Dataset.from_pandas(pandas.read_csv(path))
    return Dataset.from_pandas(pandas.read_json(path, lines=path.suffix == ".jsonl", dtype=False, convert_dates=False))


def find_split(source: str, split: str) -> Path | None:
    """The file that holds a split.

    :param source: A file (any split is that file), or a folder with ``<split>.parquet`` (or .json, .jsonl, .csv).
    :return: Its path, or None where a folder has no such split.
    :raises FileNotFoundError: if the source does not exist.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no prompt data at {source}: neither a file nor a folder")
    return next((f for suffix in _SUFFIXES if (f := path / f"{split}{suffix}").is_file()), None)


def blending_datasets(
    datasets: str,
    probabilities: str,
    strategy: Any | None = None,
    seed: int = 42,
    max_count: int = 5_000_000,
    return_eval: bool = True,
    stopping_strategy: str = "first_exhausted",
    train_split: str = "train",
    eval_split: str = "test",
) -> Dataset | tuple[Dataset, Dataset]:
    """Read one or several sources and mix them.

    :param datasets: Files or folders, separated by commas.
    :param strategy: Prints what is read, if given.
    :param max_count: Most rows taken from each source.
    :param stopping_strategy: When mixing ends, as in ``datasets.interleave_datasets``.
    :return: The training rows, or training and evaluation rows.
    :raises FileNotFoundError: if a source or split is missing.
    :raises ValueError: if there are not as many probabilities as sources.
    :raises SystemExit: if the ranks do not read the same rows.
    """
    sources = [s.strip() for s in datasets.split(",")]
    shares = [float(p) for p in probabilities.split(",")]
    if len(sources) != len(shares):
        raise ValueError(f"{len(sources)} sources but {len(shares)} probabilities: {datasets!r}, {probabilities!r}")

    def mixed(split: str) -> Dataset:
        parts = []
        for source in sources:
            path = find_split(source, split)
            if path is None:
                raise FileNotFoundError(f"{source} has no split {split!r}: expected {split}.parquet in it")
            data = _read(path)
            if strategy is not None:
                strategy.print(f"data: {path}, {len(data)} rows")
                if strategy.world_size > 1:
                    check_same(
                        {str(path): f"{len(data)} rows with digest {digest(data)}"}, "Give all hosts the same data."
                    )
            parts.append(data.select(range(min(max_count, len(data)))))
        if len(parts) == 1:
            return parts[0]
        return interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy=stopping_strategy)

    return (mixed(train_split), mixed(eval_split)) if return_eval else mixed(train_split)
