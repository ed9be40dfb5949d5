#!/usr/bin/env python3
"""A Hugging Face folder from a checkpoint for resuming, which eval_mmau.py, transformers and vLLM load.

    python examples/r1_aqa/export_checkpoint.py --checkpoint RUN --pretrain MODEL --out FOLDER

One process without a GPU does it, however the checkpoint is sharded, with memory for the whole weights and one rank's
file. Adapters are merged. Inside LightRFT there are other checkpoints: train with --save_hf_ckpt there.
"""

import argparse
import logging
import shutil
from pathlib import Path

from aqa.common.arguments import Parser
from aqa.common.files import explain
from aqa.common.versions import require
from aqa.hosts.current import current_host
from aqa.hosts.locate import find_host

find_host()


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/_actor/step_N; of RUN the newest one")
    parser.add_argument("--pretrain", required=True, help="the model that the run began with")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist or be empty")
    args = parser.parse_args()
    require("torch", "transformers", "safetensors", "deepspeed")
    current_host().prepare_import()
    logging.disable(logging.WARNING)  # of libraries
    # imported here, because torch and transformers would make --help slow
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    from aqa.patches.strategy import write_processor
    from lightrft.strategy.checkpoint import PART, replace_folder
    from lightrft.strategy.export import ExportError, export_model

    disable_progress_bar()
    part = args.out.with_name(args.out.name + PART)
    try:
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ExportError(f"--out {args.out}: exists already; name a new folder")
        checkpoint = find_checkpoint(args.checkpoint)
        shutil.rmtree(part, ignore_errors=True)
        write_processor(*export_model(checkpoint, args.pretrain, part), str(part))
        replace_folder(part, args.out)
    except (ExportError, OSError, ValueError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        why = explain(error) if isinstance(error, OSError) else error
        full = f"--out {args.out}: is the disk full? " * isinstance(error, SafetensorError)
        raise SystemExit(f"export_checkpoint.py: error: {full}{why}") from error
    print(f"{args.out}: the model of {checkpoint}")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means, once its files are what was written.

    :param path: Folder of a checkpoint, of a run's checkpoints, or of a run.
    :raises ExportError: if there is no whole one.
    """
    from lightrft.strategy.checkpoint import MANIFEST, damage, latest, newest_first
    from lightrft.strategy.export import ExportError

    folders = [path]
    if not (path / MANIFEST).is_file():
        parent = str(path / "_actor" if (path / "_actor").is_dir() else path)
        folders = newest_first(parent, latest(parent))
    for folder in folders:
        wrong = damage(folder, slice(None))
        if wrong is None:
            return folder
        print(f"note: passed over a damaged checkpoint: {folder}: {wrong}")
    raise ExportError(f"--checkpoint {path}: no whole checkpoint there")


if __name__ == "__main__":
    if current_host().name != "this repository's runtime":
        raise SystemExit("export_checkpoint.py: LightRFT's own checkpoints are not read here; use --save_hf_ckpt")
    main()
