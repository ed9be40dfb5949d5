"""Built-in demo: a tiny Qwen2-Audio and a synthetic audio question answering set, made on the spot from a seed."""

import os
from pathlib import Path

from aqa.families import BY_TYPE

FAMILIES = {family.model_types[0]: family.name for family in BY_TYPE.values()}  # value of --family: name of the model
TINY = 50_000_000  # bytes; the demo's own files are smaller


def refuse_foreign(out_dir: Path, own: str) -> None:
    """Make sure that a folder can be written, and replaced: the demo has made it, or it is empty.

    :param own: A file that such a folder of the demo has.
    :raises SystemExit: if it may not.
    """
    base = next(folder for folder in out_dir.absolute().parents if folder.exists())
    if not (base.is_dir() and os.access(base, os.W_OK)):
        raise SystemExit(f"--out_dir {out_dir}: {base} is no folder that can be written to; choose another")
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    file = out_dir / own
    if not file.is_file() or file.stat().st_size > TINY or (out_dir / "r1_aqa.json").exists():  # of a trained model
        raise SystemExit(
            f"--out_dir {out_dir}: the demo has not made this folder and will not replace it; choose another"
        )
