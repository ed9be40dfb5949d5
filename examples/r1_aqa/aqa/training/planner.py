"""``train_colocate.py --plan``: memory of a GPU, the batch's arithmetic, the flags to change; loads nothing.

    python examples/r1_aqa/train_colocate.py --plan --pretrain Qwen/Qwen2-Audio-7B-Instruct --bf16 --zero_stage 3

Arithmetic on ``config.json`` and flags (``model_sizes``, ``plan_memory``). Everything is planned for the longest
prompts, clips and responses that the flags allow, so that a run that fits here should fit with any data.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aqa.training.flags import DATA_SUFFIXES, find_problems
from aqa.training.model_sizes import (
    PARTS,
    SizeError,
    Sizes,
    count,
    decoder_flops,
    head_flops,
    parameters,
    read_sizes,
    tower_flops,
    trained,
)
from aqa.training.plan_memory import (
    COMPONENTS,
    GIB,
    PHASES,
    RESERVE,
    cache_bytes,
    engine_of,
    host_memory,
    lengths,
    memory,
    prompts_in,
)

DOES_NOT_FIT = 3  # exit status
WIDTH = 80
REASONS = {
    "bf16": "weights, gradients and activations of half the size",
    "gradient_checkpointing": "a layer's activations are computed again (slower, and prompts are not shared)",
    "micro_train_batch_size": "fewer activations, more micro-batches",
    "micro_rollout_batch_size": "a smaller log-prob forward",
    "engine_mem_util": "the engine fits beside what training keeps",
    "freeze_prefix": "not with adapters",
    "engine_tp_size": "not with hf",
    "zero_stage": "all states split among the GPUs",
    "adam_offload": "optimizer and gradients in the machine's memory (slower steps)",
    "fsdp_cpu_offload": "shards, gradients and optimizer in the machine's memory (slower steps)",
    "lora_rank": "adapters alone train: no reference model, hardly an optimizer",
    "engine_type": "generates with the trained weights instead of others beside them (slower)",
    "load_in_4bit": "the frozen language model at 4 bits a weight",
}


class GPUs(NamedTuple):
    """What is trained on.

    :param count: Ranks.
    :param gib: Memory of each, GiB.
    :param source: Where the two are from.
    """

    count: int
    gib: float
    source: str


@dataclass(frozen=True)
class Plan:
    """A configuration and what it takes.

    :param args: Flags.
    :param sizes: Of the model.
    :param gpus: What is trained on.
    :param memory: Phase, component, bytes.
    """

    args: argparse.Namespace
    sizes: Sizes
    gpus: GPUs
    memory: dict[str, dict[str, float]]

    @property
    def totals(self) -> dict[str, float]:
        """Bytes of each phase."""
        return {phase: sum(row.values()) for phase, row in self.memory.items()}

    @property
    def missing(self) -> float:
        """Bytes that are missing, of all phases together; 0: it fits."""
        limit = self.gpus.gib * GIB
        too_much = sum(max(0.0, total - limit) for total in self.totals.values())
        return too_much + max(
            0.0, self.engine_needs - engine_of(self.sizes, self.args, self.gpus.count, self.gpus.gib).cache
        )

    @property
    def engine_needs(self) -> float:
        """Bytes of keys and values without which an engine does not start: those of one longest sequence."""
        width = lengths(self.args)
        one = (width.prompt + width.response) * cache_bytes(self.sizes, 2 if self.args.bf16 else 4)
        return 0.0 if self.args.engine_type == "hf" else one / self.args.engine_tp_size


def find_gpus(args: argparse.Namespace) -> GPUs:
    """From ``--plan_gpus`` and ``--plan_gpu_gib``, then WORLD_SIZE, then what nvidia-smi lists; else R1-AQA's 8 x 80.

    :param args: Flags.
    """
    listed: list[float] = []
    if shutil.which("nvidia-smi") and None in (args.plan_gpus, args.plan_gpu_gib):
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True)
        listed = [float(line) / 1024 for line in done.stdout.split() if line.isdecimal()] if not done.returncode else []
    world = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    number = args.plan_gpus or world or len(listed) or 8
    gib = args.plan_gpu_gib or (min(listed) if listed else 80.0)
    given = args.plan_gpus and args.plan_gpu_gib
    source = "as asked" if given else "as found" if listed else "assumed: --plan_gpus, --plan_gpu_gib"
    return GPUs(number, gib, source)


def make_plan(args: argparse.Namespace, sizes: Sizes, gpus: GPUs) -> Plan:
    """What a configuration takes.

    :param args: Flags.
    :param sizes: Of the model.
    :param gpus: What is trained on.
    """
    return Plan(args, sizes, gpus, memory(sizes, args, gpus.count, gpus.gib))


# ------------------------------------------------------------------------------------------------------------- advice
def advise(plan: Plan) -> dict[str, Any]:
    """Flags that make a plan fit, the cheap ones first and none that is not needed.

    :param plan: That does not fit.
    :return: Name and value; if nothing helps enough, those that help.
    """
    chosen: dict[str, Any] = {}
    now = plan
    while now.missing:
        for change in _changes(now):
            after = _changed(now, change)
            if after.missing < now.missing - 1e-3 * GIB:
                chosen |= change
                now = after
                break
        else:
            return chosen
    share = _share(plan)
    for name in list(chosen):  # an early one may not be needed any more, or not as much
        values: list[Any] = [getattr(plan.args, name)]
        if name.startswith("micro_"):
            values += [size for size in range(values[0], chosen[name], -1) if share % size == 0]
        for value in values:
            tried = _changed(plan, chosen | {name: value})
            if not tried.missing and not find_problems(tried.args, plan.gpus.count, paths=False):
                chosen[name] = value
                break
    return {name: value for name, value in chosen.items() if value != getattr(plan.args, name)}


def _share(plan: Plan) -> int:
    """Responses of a rank in a rollout."""
    return plan.args.rollout_batch_size * plan.args.n_samples_per_prompt // plan.gpus.count


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """What can be tried next, the cheap first."""
    args, gpus = plan.args, plan.gpus
    if not args.bf16:
        yield {"bf16": True}
    yield from _smaller_engine(plan)
    share = _share(plan)
    for name in ("micro_rollout_batch_size", "micro_train_batch_size"):
        smaller = [size for size in range(1, getattr(args, name)) if share % size == 0]
        if smaller:
            yield {name: smaller[-1]}
    if not args.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if gpus.count > 1 and args.zero_stage < 3 and not args.load_in_4bit and not args.fsdp:
        yield {"zero_stage": 3}
    if args.lora_rank == 0:
        if args.fsdp and not args.fsdp_cpu_offload:
            yield {"fsdp_cpu_offload": True}
        elif not args.adam_offload and args.zero_stage and not args.fsdp:
            yield {"adam_offload": True}
        yield {"lora_rank": 16, "freeze_prefix": None, "adam_offload": False, "fsdp_cpu_offload": False}
    elif not args.load_in_4bit and not args.fsdp:
        yield {"load_in_4bit": True, "zero_stage": min(2, args.zero_stage)}
    elif args.engine_type == "vllm":
        yield {"engine_type": "hf", "engine_tp_size": 1}
    elif args.engine_mem_util > 0.1:
        yield {"engine_mem_util": round(args.engine_mem_util - 0.1, 2)}


def _smaller_engine(plan: Plan) -> Iterator[dict[str, Any]]:
    """The largest share for vLLM that leaves training what it keeps, or the smallest that it starts with."""
    if plan.args.engine_type != "vllm":
        return
    limit, engine = plan.gpus.gib * GIB, engine_of(plan.sizes, plan.args, plan.gpus.count, plan.gpus.gib)
    held = [phase for phase in PHASES if plan.memory[phase]["engine"] == engine.share]
    free = min(limit - plan.totals[phase] + engine.share for phase in held)
    least = engine.share - engine.cache + plan.engine_needs
    for share in (int(free / limit * 20) / 20, -int(-least / limit * 20 - 1) / 20):
        if 0 < share < 1 and share != plan.args.engine_mem_util and share * limit >= least:
            yield {"engine_mem_util": share}


def _changed(plan: Plan, change: dict[str, Any]) -> Plan:
    args = copy.copy(plan.args)
    for name, value in change.items():
        setattr(args, name, value)
    return make_plan(args, plan.sizes, plan.gpus)


# ---------------------------------------------------------------------------------------------------------- arithmetic
def count_rows(args: argparse.Namespace) -> int | None:
    """Rows of an episode, from the data's files; None without them.

    :param args: Flags.
    """
    found = []
    for source in (args.prompt_data or "").split(","):
        path = Path(source.strip())
        files = [path] if path.is_file() else [path / f"{args.prompt_split}{suffix}" for suffix in DATA_SUFFIXES]
        file = next((file for file in files if source and file.is_file()), None)
        if file is None or file.suffix not in (".parquet", ".jsonl"):
            return None
        if file.suffix == ".jsonl":
            found.append(sum(1 for _ in file.open("rb")))
        else:
            import pyarrow.parquet

            found.append(pyarrow.parquet.read_metadata(file).num_rows)
    return min(sum(found), args.max_samples)


def batch(plan: Plan) -> dict[str, Any]:
    """The batch's arithmetic, as ``train`` does it.

    :param plan: Of a configuration without problems.
    """
    args, world, width = plan.args, plan.gpus.count, lengths(plan.args)
    responses = args.rollout_batch_size * args.n_samples_per_prompt
    micros = responses // world // args.micro_train_batch_size
    rows = count_rows(args)
    out: dict[str, Any] = {
        "responses_a_rollout": responses,
        "responses_a_gpu": responses // world,
        "micro_batches_a_gpu": micros,
        "micro_batches_a_step": args.train_batch_size // args.micro_train_batch_size // world,
        "prompts_a_micro_batch": prompts_in(args.micro_train_batch_size, args.n_samples_per_prompt),
        "most_tokens_a_rollout": args.rollout_batch_size * width.prompt + responses * width.response,
        "rows": rows,
    }
    if rows is not None:
        # a rank's share is rounded down, as the loader does, before it is cut into batches
        rollouts = rows // world // (args.rollout_batch_size // world)
        out["steps_an_episode"] = rollouts * responses * args.max_epochs // args.train_batch_size
        out["steps"] = rollouts * args.num_episodes * responses * args.max_epochs // args.train_batch_size
    # forward, twice it backward, once more where it is computed again; a reference model's forward
    shared = args.micro_train_batch_size > 1 and not args.gradient_checkpointing
    prompts = out["prompts_a_micro_batch"] if shared else args.micro_train_batch_size
    s, tokens = plan.sizes, prompts * width.prompt + args.micro_train_batch_size * width.response
    tower = out["prompts_a_micro_batch"] * width.clips * tower_flops(s, width.seconds)
    layers = decoder_flops(s, tokens, (width.prompt + width.response) / 2)
    head = head_flops(s, args.micro_train_batch_size * width.response)
    once = micros * (tower + layers + head)
    out["training_flops_a_gpu"] = args.max_epochs * once * (4 if args.gradient_checkpointing else 3)
    return out


# -------------------------------------------------------------------------------------------------------------- output
def table(plan: Plan) -> str:
    """GiB of each component in each phase.

    :param plan: To show.
    """
    limit, engine = plan.gpus.gib, engine_of(plan.sizes, plan.args, plan.gpus.count, plan.gpus.gib)
    rows = [f"{'GiB a GPU':<18}" + "".join(f"{phase:>12}" for phase in PHASES)]
    for name in COMPONENTS:
        values = [plan.memory[phase][name] / GIB for phase in PHASES]
        if any(values):
            rows.append(f"{name:<18}" + "".join(f"{value:12.2f}" if value else f"{'-':>12}" for value in values))
    rows.append(f"{'total':<18}" + "".join(f"{plan.totals[phase] / GIB:12.2f}" for phase in PHASES))
    over = ["over" if plan.totals[phase] > limit * GIB else "" for phase in PHASES]
    if any(over):
        rows.append((f"{'':<18}" + "".join(f"{word:>12}" for word in over)).rstrip())
    rows += ["", *_engine_lines(plan, engine)]
    return "\n".join(rows)


def _engine_lines(plan: Plan, engine: Any) -> list[str]:
    args = plan.args
    if args.engine_type == "hf":
        return [f"engine     hf: keys and values of {engine.sequences} sequences at once"]
    in_step = args.rollout_batch_size * args.n_samples_per_prompt // plan.gpus.count * args.engine_tp_size
    parts = f"weights {engine.weights / GIB:.2f}, keys and values {max(0.0, engine.cache) / GIB:.2f} GiB"
    text = f"vllm: {parts}: {max(0.0, engine.sequences):.0f} sequences of full length at once, {in_step} in a rollout"
    if engine.cache < plan.engine_needs:
        text += f"; it does not start with less than {plan.engine_needs / GIB:.2f} GiB for one"
    return _entry("engine", text)


def _entry(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{name:<11}", subsequent_indent=" " * 11)


def describe(plan: Plan, advice: dict[str, Any]) -> str:
    """The plan for a person.

    :param plan: To show.
    :param advice: From :func:`advise`.
    """
    args, sizes, gpus, width = plan.args, plan.sizes, plan.gpus, lengths(plan.args)
    every = parameters(sizes)
    some = trained(sizes, args.freeze_prefix or (), args.lora_rank, args.target_modules)
    base = count(every) + (count(some) if args.lora_rank else 0)
    counts = ", ".join(f"{part} {count(every, part) / 1e6:,.1f} M" for part in PARTS)
    what = f"adapters of rank {args.lora_rank}" if args.lora_rank else "trained"
    numbers = batch(plan)
    lines = _entry("model", f"{args.pretrain}: {count(every):,} parameters: {counts}")
    lines += _entry("", f"{what} {count(some):,} ({count(some) / base:.2%})")
    kind = ("bf16" if args.bf16 else "fp32") + (", 4-bit base" if args.load_in_4bit else "")
    offload = ", optimizer offloaded" if args.adam_offload else ""
    offload += ", parameters offloaded" if getattr(args, "param_offload", False) else ""
    offload += ", offloaded" if args.fsdp_cpu_offload else ""
    sharding = "FSDP2" if args.fsdp else f"ZeRO-{args.zero_stage}"
    again = ", checkpointing" if args.gradient_checkpointing else ""
    lines += _entry("GPUs", f"{gpus.count} x {gpus.gib:g} GiB ({gpus.source}); {sharding}, {kind}{offload}{again}")
    longest = (
        f"{width.prompt} tokens of prompt ({width.clips} clip of {width.seconds:g} s), {width.response} of response"
    )
    lines += _entry("longest", longest)
    per = f"{numbers['responses_a_gpu']} a GPU, in {numbers['micro_batches_a_gpu']} micro-batches"
    text = (
        f"{args.rollout_batch_size} prompts x {args.n_samples_per_prompt} = {numbers['responses_a_rollout']} responses "
    )
    text += f"a rollout, {per} of {args.micro_train_batch_size}; {args.train_batch_size} an optimizer step, "
    text += f"{numbers['micro_batches_a_step']} micro-batches; "
    text += f"at most {numbers['most_tokens_a_rollout']:,} tokens a rollout"
    lines += _entry("batch", text)
    lines += _entry("", f"{numbers['training_flops_a_gpu'] / 1e12:,.1f} TFLOP of training a rollout and GPU")
    if numbers["rows"] is None:
        lines += _entry("steps", "unknown: no rows of --prompt_data to count")
    else:
        steps = f"{numbers['rows']:,} rows: {numbers['steps_an_episode']:,} optimizer steps an episode"
        lines += _entry("steps", f"{steps}, {numbers['steps']:,} in all")
    lines += ["", table(plan)]
    host = {name: size for name, size in host_memory(sizes, args, gpus.count).items() if size}
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in host.items())
    lines += _entry("machine", f"{sum(host.values()) / GIB:.1f} GiB of its memory for each GPU: {parts or 'nothing'}")
    lines += _entry("assumed", f"reserve (CUDA, NCCL, fragmentation) {RESERVE / GIB:g} GiB; never compared with a GPU")
    return "\n".join([*lines, "", *_verdict(plan, advice)])


def _verdict(plan: Plan, advice: dict[str, Any]) -> list[str]:
    worst = max(PHASES, key=plan.totals.__getitem__)
    at_most = f"{plan.totals[worst] / GIB:.1f} of {plan.gpus.gib:g} GiB, in {worst}"
    if not plan.missing:
        return [f"It fits: at most {at_most}.", *_room(plan)]
    lines = [f"It does not fit: {at_most}.", ""]
    if not advice:
        return [*lines, "No flag helps: more or larger GPUs, or a smaller model."]
    now = plan
    for name, value in advice.items():
        after = _changed(now, {name: value})
        worst = max(PHASES, key=lambda phase, now=now, after=after: now.totals[phase] - after.totals[phase])
        figures = f"{worst} {now.totals[worst] / GIB:.1f} -> {after.totals[worst] / GIB:.1f}"
        lines += textwrap.wrap(f"  {_flag(name, value)}: {REASONS[name]}; {figures}", WIDTH, subsequent_indent="      ")
        now = after
    most = max(now.totals.values()) / GIB
    lines.append(f"With these it {'still does not fit' if now.missing else 'fits'}: at most {most:.1f} GiB.")
    return lines


def _room(plan: Plan) -> list[str]:
    """What would make it faster and fit, too."""
    args = plan.args
    share = _share(plan)
    options: list[dict[str, Any]] = [{"gradient_checkpointing": False}] if args.gradient_checkpointing else []
    larger = [size for size in range(args.micro_train_batch_size + 1, share + 1) if share % size == 0]
    options += [{"micro_train_batch_size": size} for size in larger[-1:]] if larger else []
    for change in options:
        after = _changed(plan, change)
        if not after.missing:
            flags = " ".join(_flag(name, value) for name, value in change.items())
            return [f"There is room for {flags}, too: {max(after.totals.values()) / GIB:.1f} GiB, and faster."]
    return []


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"without --{name}" if value is None else f"--{name} {value}"


def as_json(plan: Plan, advice: dict[str, Any]) -> str:
    """The plan for the next tool.

    :param plan: To show.
    :param advice: From :func:`advise`.
    """
    args, every = plan.args, parameters(plan.sizes)
    some = trained(plan.sizes, args.freeze_prefix or (), args.lora_rank, args.target_modules)
    document = {
        "fits": not plan.missing,
        "gpus": plan.gpus._asdict(),
        "parameters": {part: count(every, part) for part in PARTS} | {"trained": count(some)},
        "longest": lengths(args)._asdict(),
        "batch": batch(plan),
        "bytes_a_gpu": plan.memory,
        "totals": plan.totals,
        "engine": engine_of(plan.sizes, args, plan.gpus.count, plan.gpus.gib)._asdict(),
        "machine_bytes_a_gpu": host_memory(plan.sizes, args, plan.gpus.count),
        "change": advice,
        "fits_changed": not _changed(plan, advice).missing,
    }
    return json.dumps(document, indent=2)


def run(args: argparse.Namespace, problems: list[str]) -> int:
    """Print the plan.

    :param args: Finished flags.
    :param problems: Of the host's flags.
    :return: Exit status: 0 it fits, :data:`DOES_NOT_FIT`, 2 wrong use.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    gpus = find_gpus(args)
    problems = [*find_problems(args, gpus.count, paths=False), *problems]
    if not args.pretrain:
        problems.append("--pretrain is missing: a model folder or hub name")
    if not problems:
        try:
            plan = make_plan(args, read_sizes(args.pretrain), gpus)
        except SizeError as error:
            problems.append(str(error))
    if problems:
        print(f"{len(problems)} problems with this configuration:", *problems, sep="\n  - ", file=sys.stderr)
        return 2
    advice = advise(plan) if plan.missing else {}
    print(as_json(plan, advice) if args.plan == "json" else describe(plan, advice))
    return DOES_NOT_FIT if plan.missing else 0
