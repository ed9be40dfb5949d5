"""Built-in demo: a tiny Qwen2-Audio and a synthetic audio question answering set, made on the spot from a seed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aqa.common.files import explain, unwritable
from aqa.common.versions import require
from aqa.families import BY_TYPE

require("numpy", "torch", "transformers", "soundfile")

FAMILIES = {family.model_types[0]: family.name for family in BY_TYPE.values()}  # value of --family: name of the model
TINY = 50_000_000  # bytes; the demo's own files are smaller


def refuse_foreign(out_dir: Path, own: str) -> None:
    """Make sure that a folder can be written, and replaced: the demo has made it, or it is empty.

    :param own: A file that such a folder of the demo has.
    :raises SystemExit: if it may not.
    """
    if problem := unwritable(out_dir.absolute().parent):
        raise SystemExit(f"--out_dir {out_dir}: {problem}")
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    file = out_dir / own
    if not file.is_file() or file.stat().st_size > TINY or (out_dir / "r1_aqa.json").exists():  # of a trained model
        raise SystemExit(
            f"--out_dir {out_dir}: the demo has not made this folder and will not replace it; choose another"
        )


@contextmanager
def written(out_dir: Path, own: str) -> Iterator[Path]:
    """A folder to fill; at the end it takes the place of an older one of the demo, so that it is there whole or not.

    :param own: See :func:`refuse_foreign`.
    :raises SystemExit: if the demo has not made what is there, or it cannot be written.
    """
    refuse_foreign(out_dir, own)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as temporary:
            folder = Path(temporary) / out_dir.name
            folder.mkdir()
            yield folder
            if out_dir.exists():
                shutil.rmtree(out_dir)
            folder.rename(out_dir)
    except write_errors() as error:
        file = getattr(error, "filename", None)
        if file and not Path(file).absolute().is_relative_to(out_dir.parent.absolute()):
            raise  # of a file that is read
        why = explain(error) if isinstance(error, OSError) else f"{error}; is the disk full?"
        raise SystemExit(f"--out_dir {out_dir}: cannot be written: {why}") from error


def write_errors() -> tuple[type[Exception], ...]:
    """What the writers of weights and sounds raise; imported when one of them has failed."""
    from safetensors import SafetensorError
    from soundfile import SoundFileError

    return OSError, SafetensorError, SoundFileError
