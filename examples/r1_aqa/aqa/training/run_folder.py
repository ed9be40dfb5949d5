"""A run's folder belongs to one run.

Each run has an id. It stands in ``<save_path>/run_config.json``, beside the checkpoints in ``<ckpt_path>/_actor/
run.json``, and in the note of every model that the run writes. A new run in a used folder moves the older run's files
into ``earlier/``; a resumed one must be the run of the folder and of the checkpoints, with the same settings. Two locks
(``run.lock``) keep a second training out. All of this is rank 0's work, and needs no torch.
"""

import argparse
import errno
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from aqa.common.files import write_atomically
from aqa.common.lock import LockedError, lock
from aqa.evaluation.checkpoints import NOTES_FILE
from aqa.training.flags import DATA_SUFFIXES
from aqa.training.run_config import CONFIG
from aqa.training.summary import read_metrics

LOCK, EARLIER, CHECKPOINTS = "run.lock", "earlier", "_actor"
RECORD = "run.json"  # in the folder of the checkpoints
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"),
    *("processor_config.json", "preprocessor_config.json", "model.part", "adapter", NOTES_FILE),
)
# the file that marks a folder as a run's is moved last: after a kill the next start still knows it, and moves the rest
RUN_FILES = (
    *(CHECKPOINTS, "global_step*_hf", "hf_step_*", "warm_start", "warm_start.*", "best", "best.*"),
    *("trajectories", "trajectories.old", "eval"),
    *("report.html", "compared.json", "metrics.csv", "wandb", "wandb_run_id.txt", "metrics.jsonl*", CONFIG),
)
MARKS = (CHECKPOINTS, NOTES_FILE, "metrics.jsonl", CONFIG)  # each shows that a run has written the folder's other files
OWN_LOG = re.compile(r"rank\d+\.log")  # of the processes that are starting; older ones have a date in their name
BLOCK, BLOCKS = 2**20, 16  # bytes, and number, of the parts of a large file that are compared

# A resumed run may change these flags freely, because they do not decide what is trained. All others are compared, so
# a new flag is, too, unless it is added here.
FREE = frozenset(
    shlex.split("""
    debug verbose quiet report plan plan_gpus plan_gpu_gib plan_clip_seconds allow_changes load_checkpoint save_path
    ckpt_path save_steps save_hf_ckpt save_hf_on_stop disable_ds_ckpt max_ckpt_num on_save_error save_trajectories
    num_trajectories_to_save use_wandb wandb_org wandb_group wandb_project wandb_run_name wandb_table_steps
    use_tensorboard eval_data eval_split max_eval_samples eval_benchmark eval_audio_dir eval_think eval_silent
    eval_steps keep_best
    micro_train_batch_size micro_rollout_batch_size flash_attn gradient_checkpointing adam_offload param_offload
    fsdp_cpu_offload sync_bucket_mb engine_tp_size engine_mem_util enable_engine_sleep limit_mm_image_per_prompt
    decode_audio audio_cache_mib confine_audio sandbox_audio
    """)
)
# Settings that cannot be changed, even if --allow_changes names them.
_FORM = "the checkpoint's tensors have another dtype, shape or set of trained parameters"
_RANKS = "only the same sharding, on the same number of ranks, can read the checkpoint"
FIXED = {
    "pretrain": "the weights are the checkpoint's; another start model needs a new run (another --save_path)",
    **dict.fromkeys(("bf16", "lora_rank", "target_modules", "freeze_prefix", "load_in_4bit"), _FORM),
    **dict.fromkeys(("fsdp", "zero_stage", "ranks"), _RANKS),
    "sft_steps": "checkpoints are counted from its first step; start a new run",
}
# Settings that decide nothing while another flag is off.
SWITCHES = {
    **dict.fromkeys(("target_modules", "lora_alpha"), "lora_rank"),
    **dict.fromkeys(("overlong_buffer_len", "overlong_buffer_penalty_factor"), "overlong_buffer"),
    "dynamic_sampling_rounds": "dynamic_sampling",
    "sft_learning_rate": "sft_steps",
}
ENDS = {
    4: "--on_anomaly stop",
    **{128 + number: number.name for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)},
}


class RunFolder:
    """The folder of a run, on rank 0; made by :func:`open_run`.

    :param args: Finished flags.
    :param flags: Those that are recorded, by name.
    :param ranks: Number of processes.
    """

    def __init__(self, args: argparse.Namespace, flags: dict[str, Any], ranks: int) -> None:
        self.args = args
        self.save, self.ckpt = Path(args.save_path), Path(args.ckpt_path)
        self.started = _now()
        self.notes: list[str] = []  # what the user should know
        self.changes: dict[str, list[str]] = {}  # settings that this session changes: old and new value
        self.record = {
            "run": f"{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(3).hex()}",
            "ranks": ranks,
            "digests": {
                "pretrain": model_digest(args.pretrain),
                "prompt_data": data_digest(args),
                "reward": reward_digest(args.reward),
            },
            "flags": flags,
        }
        self.config: dict[str, Any] | None = None  # run_config.json, once the session is recorded there

    @property
    def run(self) -> str:
        return self.record["run"]

    # ------------------------------------------------------------ before anything loads
    def check(self, defaults: dict[str, Any]) -> None:
        """Refuse a folder that a new run must not use, or a resumed run that is not the folder's own.

        :param defaults: Flags that an older record may lack.
        :raises SystemExit: saying what is wrong and what to do.
        """
        self._check_inputs()
        if not _is_run(self.save) and (foreign := _matching(self.save, (*MODEL_FILES, *RUN_FILES))):
            raise SystemExit(
                f"--save_path {self.save}: holds {_few(foreign)}, which no run of this program has written and this "
                "one would write over; choose another folder"
            )
        if self.args.load_checkpoint:
            self._check_resume(defaults)
        else:
            self._check_checkpoints()

    def _check_inputs(self) -> None:
        """Refuse to write over, or move aside, what the run reads."""
        moved = {} if self.args.load_checkpoint else {path.resolve() for path in self._older_files()}
        for flag in ("pretrain", "prompt_data", "eval_data", "eval_benchmark", "eval_audio_dir"):
            for name in filter(None, (getattr(self.args, flag) or "").split(",")):
                path = Path(name.strip()).resolve()
                if path == self.save.resolve() or any(each in (path, *path.parents) for each in moved):
                    raise SystemExit(
                        f"--save_path {self.save}: --{flag} {name} lies there, and the new run would write over it or "
                        "move it aside; choose another --save_path"
                    )

    def _check_checkpoints(self) -> None:
        """Refuse to move another run's checkpoints aside."""
        record = _read(self.ckpt / CHECKPOINTS / RECORD) or {}
        if not record and (self._one_place() or not self._holds_checkpoints()):
            return
        config: dict[str, Any] = {}
        with suppress(SystemExit):  # a damaged one is moved aside
            config = _read(self.save / CONFIG) or {}
        ours, theirs, flags = config.get("run"), record.get("run"), record.get("flags", {})
        in_one = self._one_place() and flags.get("save_path") == flags.get("ckpt_path")  # perhaps moved since
        if not ((ours == theirs and _is_run(self.save)) or (ours is None and in_one) or self._names_both(record)):
            home = f", whose folder is {flags['save_path']}" if "save_path" in flags else ""
            raise SystemExit(
                f"--ckpt_path {self.ckpt}: its {CHECKPOINTS} holds checkpoints of {_name(theirs)}{home}; give this run "
                "another --ckpt_path"
            )

    def _one_place(self) -> bool:
        return self.ckpt.resolve() == self.save.resolve()

    def _names_both(self, record: dict[str, Any]) -> bool:
        """Whether a record was written by a run in these two folders."""
        flags = record.get("flags", {})
        return all(
            isinstance(flags.get(name), str) and Path(flags[name]).resolve() == path.resolve()
            for name, path in (("save_path", self.save), ("ckpt_path", self.ckpt))
        )

    def _holds_checkpoints(self) -> bool:
        return any(not path.name.startswith(RECORD) for path in (self.ckpt / CHECKPOINTS).glob("*"))

    def _check_resume(self, defaults: dict[str, Any]) -> None:
        config, record = _read(self.save / CONFIG), _read(self.ckpt / CHECKPOINTS / RECORD)
        ours, theirs = (part and part.get("run") for part in (config, record))
        if config and None in (ours, theirs):  # an older version began the run, or its checkpoints are gone
            known = record if theirs else config
            if self._one_place() or self._names_both(known) or not self._holds_checkpoints():
                ours = theirs = ours or theirs
        if ours != theirs and (config or theirs is None):
            raise SystemExit(
                f"--load_checkpoint: {self.ckpt / CHECKPOINTS} holds checkpoints of {_name(theirs)}, and --save_path "
                f"{self.save} is the folder of {_name(ours)}; name the two folders of one run (older runs of a folder "
                f"are in its {EARLIER}/)"
            )
        old = record or config
        if old is None:
            self.notes.append("note: the checkpoint says nothing about its run's settings, so none are compared")
            return
        if theirs is None:
            self.notes.append("note: an older version wrote this run: only flags are compared, not model and data")
        self.record["run"] = theirs or self.run
        found = differences(old, self.record, defaults)
        fixed = FIXED | ({"init_kl_coef": "--kl_target has adapted it since"} if self.args.kl_target else {})
        if [each.get("digests", {}).get("pretrain") for each in (old, self.record)].count(None) == 1:
            fixed.pop("pretrain")  # a name on the hub and a folder may be the same model
        if refusal := refuse(found, fixed, self.args.allow_changes or [], [*self.record["flags"], "ranks"]):
            raise SystemExit(refusal)
        self.changes = found
        self.notes += [f"changed   {name}: {a}, from now on {b}" for name, (a, b) in found.items()]

    # ------------------------------------------------------------ when models and data are there
    def trained(self) -> int:
        """Prompts that the final model in the folder was trained on; 0 if there is none of this run."""
        note = _read(self.save / NOTES_FILE) or {}
        return note.get("prompts") or 0 if note.get("run") == self.run and _has_model(self.save) else 0

    def begin(self, step: int, about: dict[str, Any]) -> list[str]:
        """Make the folder this run's, and record the session.

        :param step: Steps that a resumed run has already done.
        :param about: Further entries for ``run_config.json``.
        :return: Lines for the user.
        :raises SystemExit: if the files cannot be moved or written.
        """
        with naming(f"--save_path {self.save}"):
            self._begin(step, about)
        return self.notes

    def _begin(self, step: int, about: dict[str, Any]) -> None:
        old = (_read(self.save / CONFIG) or {}) if self.args.load_checkpoint else {}
        if not self.args.load_checkpoint:
            self._set_aside(self._older_files())
        elif _has_model(self.save) and (_read(self.save / NOTES_FILE) or {}).get("run") != self.run:
            self._set_aside(_matching(self.save, MODEL_FILES))  # it names no run, so it may be another one's
        flags, before = self.record["flags"], old.get("flags", {})
        others = {
            name: [str(value), str(flags[name])]
            for name, value in before.items()
            if name not in ("load_checkpoint", "allow_changes", "wandb_run_name") and flags.get(name, value) != value
        }
        session = {
            "started": self.started,
            "machine": socket.gethostname(),
            "ranks": self.record["ranks"],
            "changes": others | self.changes,
            "first_step": step + 1,
        }
        sessions = old.get("sessions") or ([{"started": old["started"]}] if "started" in old else [])
        started = old.get("started", session["started"])
        self.config = {"started": started} | about | self.record | {"sessions": [*sessions, session]}
        self._write_config()
        if not self.args.disable_ds_ckpt:
            (self.ckpt / CHECKPOINTS).mkdir(exist_ok=True)
            write_atomically(self.ckpt / CHECKPOINTS / RECORD, json.dumps(self.record, indent=2) + "\n")

    def end(self, error: BaseException | None = None) -> None:
        """Record how the session ended, if it has begun and this is not recorded yet."""
        if self.config is None or "ended" in self.config["sessions"][-1]:
            return
        how = "finished"
        if isinstance(error, SystemExit) and isinstance(error.code or 0, int):
            how = ENDS.get(error.code, f"exit status {error.code or 0}")
        elif error is not None:
            kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
            how = f"{kind}{error}".splitlines()[0][:200]
        records = read_metrics(self.save / "metrics.jsonl")
        self.config["sessions"][-1] |= {"ended": _now(), "how": how, "last_step": records[-1]["step"] if records else 0}
        with suppress(OSError):  # a full disk has been reported by whatever ended the run; this session has no end then
            self._write_config()

    def _write_config(self) -> None:
        write_atomically(self.save / CONFIG, json.dumps(self.config, indent=2) + "\n")

    def _older_files(self) -> list[Path]:
        """What an older run has left in the two folders."""
        found = []
        if _is_run(self.save):
            found = _matching(self.save, (*MODEL_FILES, *RUN_FILES))
            if not (self.save / "logs").is_symlink():  # where it leads is not this run's to change
                found[-1:-1] = [path for path in self.save.glob("logs/*") if not OWN_LOG.fullmatch(path.name)]
        if self.ckpt.resolve() != self.save.resolve():
            found = _matching(self.ckpt, (CHECKPOINTS, "global_step*_hf")) + found
        return found

    def _set_aside(self, files: list[Path]) -> None:
        """Rename files of an older run into ``earlier/<id>`` of their folder."""
        if not files:
            return
        config: dict[str, Any] = {}
        with suppress(SystemExit):  # a damaged record is moved aside, too
            config = _read(self.save / CONFIG) or _read(self.ckpt / CHECKPOINTS / RECORD) or {}
        name = config.get("run") or f"{datetime.fromtimestamp(files[-1].lstat().st_mtime):%Y%m%d-%H%M%S}"
        homes = {path: self.save if path.is_relative_to(self.save) else self.ckpt for path in files}
        target, number = name, 1
        while any(os.path.lexists(home / EARLIER / target / path.relative_to(home)) for path, home in homes.items()):
            target, number = f"{name}-{number + 1}", number + 1
        for path, home in homes.items():
            new = home / EARLIER / target / path.relative_to(home)
            new.parent.mkdir(parents=True, exist_ok=True)
            path.rename(new)
        places = " and ".join(str(home / EARLIER / target) for home in dict.fromkeys(homes.values()))
        self.notes.append(f"note: what an earlier run had left in {self.save} is now in {places}")


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Name the place where something could not be written, or who else writes there."""
    try:
        yield
    except LockedError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        why, remedy = error.strerror, "make room there, see to the rights"
        if error.errno in (errno.EXDEV, errno.EBUSY, errno.EEXIST):
            why, remedy = f"{error.filename}: {why}", "move that away yourself"
        raise SystemExit(f"{place}: cannot be written ({why}); {remedy}, or choose another folder") from None


@contextmanager
def open_run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterator[RunFolder | None]:
    """Hold the run's folders during a ``with`` block; on rank 0, None on others, which write only where rank 0 does.

    :param args: Finished flags.
    :param parser: Knows which flags there are, and their defaults.
    :raises SystemExit: if another process trains into them, they are not fit for this run, or cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield None
        return
    defaults = vars(parser.parse_args([]))
    flags = {name: plain(getattr(args, name)) for name in defaults}
    with ExitStack() as locks:
        for flag in ("save_path", "ckpt_path"):
            path = Path(getattr(args, flag))
            if flag == "ckpt_path" and path.resolve() == Path(args.save_path).resolve():
                continue
            with naming(f"--{flag} {path}"):
                path.mkdir(parents=True, exist_ok=True)
                locks.enter_context(lock(path / LOCK, f"--{flag} {path}"))
        folder = RunFolder(args, flags, int(os.environ.get("WORLD_SIZE", "1")))
        folder.check({name: plain(value) for name, value in defaults.items()})
        try:
            yield folder
        except BaseException as error:
            folder.end(error)
            raise
        folder.end()


# ------------------------------------------------------------------------------------------------------------ comparing
def differences(old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any]) -> dict[str, list[str]]:
    """Settings that decide what is trained and that two sessions of a run do not have in common.

    Model and data are compared by their content, which an older record may lack: moving them changes nothing. A user's
    reward is compared by its name and its module's own file.

    :param old: The record of the checkpoint's run.
    :param new: The present one.
    :param defaults: Values of flags that did not exist when the old record was written.
    :return: Name to old and new value, as texts.
    """
    found = {}
    before, now = ({"ranks": r.get("ranks", new["ranks"])} | r.get("flags", {}) for r in (old, new))
    for name, value in now.items():
        was = before.get(name, defaults.get(name, value))
        digests = [record.get("digests", {}).get(name) for record in (old, new)]
        switch = SWITCHES.get(name)
        if name in FREE or (name == "zero_stage" and now.get("fsdp")):
            continue
        if switch and not (now[switch] and before.get(switch, defaults.get(switch))):
            continue
        if None not in digests:
            if digests[0] != digests[1] or (name == "reward" and was != value):
                found[name] = [f"{text} (content {digest})" for text, digest in zip((was, value), digests, strict=True)]
        elif was != value and (name == "reward" or digests[1] is None or "digests" in old):
            found[name] = [str(was), str(value)]
    return found


def refuse(
    found: dict[str, list[str]], fixed: dict[str, str], allowed: Iterable[str], known: Iterable[str]
) -> str | None:
    """Why a run cannot be resumed with changed settings.

    :param found: From :func:`differences`.
    :param fixed: Settings that cannot be changed, and why.
    :param allowed: What ``--allow_changes`` names.
    :param known: What it may name.
    :return: None if it can.
    """
    if unknown := sorted(set(allowed) - set(known)):
        return f"--allow_changes {' '.join(unknown)}: no such flag; give names without dashes, such as num_episodes"
    left = {name: values for name, values in found.items() if name in fixed or name not in allowed}
    if not left:
        return None
    lines = [f"  - {name}: {old}, now {new}" + (f" ({fixed[name]})" if name in fixed else "")
             for name, (old, new) in left.items()]  # fmt: skip
    may = " ".join(name for name in left if name not in fixed)
    remedy = "Give them as they were" + (f", or --allow_changes {may} if this is meant" if may else "")
    return "\n".join(["--load_checkpoint: this run was trained with other settings:", *lines, remedy + "."])


def model_digest(pretrain: str) -> str | None:
    """A short hash of a model's configuration and weights; None for a name on the hub."""
    files = [path for pattern in ("config.json", "*.safetensors", "*.bin") for path in Path(pretrain).glob(pattern)]
    return _digest(sorted(files)) if files else None


def reward_digest(reward: str) -> str | None:
    """A short hash of the files of a user's ``module:function``, one or parts of a sum; None without any."""
    files = []
    for module in [part.partition(":")[0] for part in reward.split("+") if ":" in part]:
        places = [Path(place, *module.split(".")) for place in (os.getcwd(), *sys.path[1:])]  # sys.path[0] is ours
        paths = (path for place in places for path in (place.with_suffix(".py"), place / "__init__.py"))
        files += [path for path in paths if path.is_file()][:1]
    return _digest(files) if files else None


def data_digest(args: argparse.Namespace) -> str:
    """A short hash of the training rows and their order."""
    files = []
    for source in map(Path, map(str.strip, args.prompt_data.split(","))):
        splits = [source] if source.is_file() else [source / f"{args.prompt_split}{end}" for end in DATA_SUFFIXES]
        files += [path for path in splits if path.is_file()][:1]
    return _digest(files)


def _digest(files: list[Path]) -> str:
    """A hash of files' contents; of a large file, of its size and parts that are spread over it."""
    state = hashlib.blake2b(digest_size=6)
    for path in files:
        size = path.stat().st_size
        state.update(f"{path.suffix} {size} ".encode())
        with path.open("rb") as file:
            for part in range(BLOCKS):
                if size > BLOCK * BLOCKS:
                    file.seek(part * (size - BLOCK) // (BLOCKS - 1))
                state.update(file.read(BLOCK))
    return state.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- files
def _is_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS)


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = (path for pattern in patterns for path in (folder / pattern, *sorted(folder.glob(pattern))))
    return [
        path for path in dict.fromkeys(found) if os.path.lexists(path)
    ]  # glob passes over a link that leads nowhere


def _few(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _name(run: str | None) -> str:
    return f"run {run}" if run else "a run without an id"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def plain(value: Any) -> Any:
    """A flag's value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None if there is none.

    :raises SystemExit: if it is damaged, not readable or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} instead of an object")
        return content
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise SystemExit(f"{path}: cannot be read ({error}); put it right, or remove it") from None
