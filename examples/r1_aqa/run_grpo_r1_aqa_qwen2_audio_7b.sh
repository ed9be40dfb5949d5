#!/usr/bin/env bash
# Train Qwen2-Audio-7B-Instruct with GRPO on AVQA, with R1-AQA's settings. Every variable below can be set in the
# environment:
#
#   PATH_TO_YOUR_BASE_MODEL=... PATH_TO_YOUR_AVQA_DATASET=... bash examples/r1_aqa/run_grpo_r1_aqa_qwen2_audio_7b.sh
#
# Further arguments are passed to train_colocate.py. --plan prints what the whole launch would need on its GPUs, and
# starts nothing. RESUME=1 continues the run that RUN_ID names, else the newest with this EXPERIMENT_NAME, EPISODE, KL
# and LR, from its last checkpoint; train_colocate.py refuses other settings than it was begun with.
# The exit status is the training's, or 138, 143 or 130 if SIGUSR1, SIGTERM or Ctrl-C ended it after it saved its state.
# A wandb key comes from the environment (WANDB_API_KEY) or from a login; it never appears on a command line.
set -euo pipefail

# ---- model and data
PATH_TO_YOUR_BASE_MODEL="${PATH_TO_YOUR_BASE_MODEL:-Qwen/Qwen2-Audio-7B-Instruct}"
PATH_TO_YOUR_AVQA_DATASET="${PATH_TO_YOUR_AVQA_DATASET:-}"
EXPERIMENT_NAME="${EXPERIMENT_NAME:-lightrft-r1-aqa-grpo-training}"

# ---- recipe: 16 prompts x 8 responses = 128 per step, 1,000 steps
EPISODE="${EPISODE:-1}"
MAX_SAMPLES="${MAX_SAMPLES:-16000}"         # rows per episode: 16 x 1,000 of AVQA's 38,000
RBS="${RBS:-16}"                            # prompts per rollout
N_SAMPLES="${N_SAMPLES:-8}"                 # responses per prompt
TBS="${TBS:-128}"                           # responses per optimizer step, at least RBS x N_SAMPLES
MICRO_TRAIN="${MICRO_TRAIN:-$N_SAMPLES}"    # responses per forward and backward pass
MICRO_ROLLOUT="${MICRO_ROLLOUT:-$N_SAMPLES}" # responses per forward pass for log-probs
KL="${KL:-0.04}"
LR="${LR:-1e-6}"
WARMUP="${WARMUP:-0.03}"
TEMPERATURE="${TEMPERATURE:-1.0}"
PROMPT_MAX_LEN="${PROMPT_MAX_LEN:-512}"
GENERATE_MAX_LEN="${GENERATE_MAX_LEN:-256}"
EVAL_STEPS="${EVAL_STEPS:-100}"             # -1: never
SAVE_STEPS="${SAVE_STEPS:-100}"

# ---- machines
export MLP_WORKER_NUM="${MLP_WORKER_NUM:-1}"                    # number of nodes
export MLP_WORKER_GPU="${MLP_WORKER_GPU:-8}"                    # processes per node, one for each GPU
export MLP_ROLE_INDEX="${MLP_ROLE_INDEX:-0}"                    # this node's number, from 0
export MLP_WORKER_0_HOST="${MLP_WORKER_0_HOST:-localhost}"
export MLP_WORKER_0_PORT="${MLP_WORKER_0_PORT:-}"               # where node 0 listens; default: any free, several nodes: 20092
ENGINE_TP="${ENGINE_TP:-1}"
ENGINE_MEM_UTIL="${ENGINE_MEM_UTIL:-0.5}"

# ---- tracking: WANDB_API_KEY or WANDB_MODE=offline turns wandb on
export WANDB_PROJECT="${WANDB_PROJECT:-LightRFT-R1-AQA}"

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON="${PYTHON:-python3}"
PYTHON="${PYTHON/#\~\//$HOME/}"             # an env file leaves ~ as it is; train_colocate.py replaces it in its paths
if [ -z "$PATH_TO_YOUR_AVQA_DATASET" ]; then
    echo "PATH_TO_YOUR_AVQA_DATASET is not set: it names the folder that data_preprocess/avqa.py wrote" >&2
    exit 2
fi

if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "$PYTHON has no torch: set PYTHON to an interpreter that has it (PYTHON=.venv/bin/python);" \
        "$here/README.md, Prerequisites, says how to make one" >&2
    exit 2
fi

plan=0
for argument in "$@"; do
    if [ "$argument" = --plan ]; then plan=1; fi
done

# bfloat16 and ZeRO-3 are for GPUs; a CPU trains the demo's model in float32. GPUs that the driver lists and torch cannot
# use are refused here, with the reason: nobody wants to train the 7B model on the CPU by mistake.
device=cuda
if [ "$plan" = 0 ]; then
    device="$(PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m aqa.common.gpu "$MLP_WORKER_GPU")" || exit 2
fi
if [ "$device" = cuda ]; then
    precision=(--bf16 --zero_stage 3 --gradient_checkpointing)
else
    precision=(--no-bf16 --zero_stage 2)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR=cpu
fi
wandb=()
if [ -n "${WANDB_API_KEY:-}" ] || [ "${WANDB_MODE:-}" = "offline" ]; then
    wandb=(--use_wandb)
fi

# RUN_ID names the run; it must be the same on all nodes, because they write into the same folder
if [ "$MLP_WORKER_NUM" -gt 1 ] && [ -z "${RUN_ID:-}" ]; then
    echo "RUN_ID is not set: all $MLP_WORKER_NUM nodes must name the same run, e.g. RUN_ID=first" >&2
    exit 2
fi
results="results/${EXPERIMENT_NAME}"
settings="${EXPERIMENT_NAME}-ep${EPISODE}-kl${KL}-lr${LR}"
run="${settings}-${RUN_ID:-$(date +%Y%m%d_%H%M%S)}"
resume=()
if [ "${RESUME:-0}" = 1 ]; then
    number='[0-9.]+(e[-+]?[0-9]+)?'
    found=""
    while read -r sign; do                  # from the newest to the oldest
        folder="${sign%/*}"
        folder="${folder%/_actor}"
        name="${folder##*/}"
        if [ "$sign" = "$folder/r1_aqa.json" ] && [ ! -e "$folder/config.json" ]; then
            continue                        # the end of a training was killed while it wrote the model
        fi
        if [ "$name" = "$run" ] || { [ -z "${RUN_ID:-}" ] && [[ "$name" == "$settings"-* ]]; }; then
            found="$name"
            break
        # a run of this name that was begun with other settings: train_colocate.py says which may be changed
        elif [[ "$name" =~ ^"$EXPERIMENT_NAME"-ep$number-kl$number-lr$number-"${RUN_ID:-}"$ ]]; then
            found="${found:-$name}"
        fi
    # of a finished run, which may have no checkpoint, train_colocate.py says whether there is something left to do
    done < <(ls -t "$results"/*/_actor/latest "$results"/*/r1_aqa.json 2>/dev/null)
    if [ -n "$found" ]; then
        run="$found"
        resume=(--load_checkpoint)
        echo "resuming $results/$run"
    else
        echo "RESUME=1, but no run $settings-${RUN_ID:-*} in $results has a checkpoint or a model: starting from the beginning"
    fi
fi
save_path="$results/$run"
flags=(
    --pretrain "$PATH_TO_YOUR_BASE_MODEL"
    --prompt_data "$PATH_TO_YOUR_AVQA_DATASET"
    --save_path "$save_path"
    --ckpt_path "$save_path"
    --num_episodes "$EPISODE"
    --max_samples "$MAX_SAMPLES"
    --rollout_batch_size "$RBS"
    --n_samples_per_prompt "$N_SAMPLES"
    --train_batch_size "$TBS"
    --micro_train_batch_size "$MICRO_TRAIN"
    --micro_rollout_batch_size "$MICRO_ROLLOUT"
    --advantage_estimator group_norm
    --init_kl_coef "$KL"
    --use_kl_loss
    --kl_estimator k3
    --actor_learning_rate "$LR"
    --lr_warmup_ratio "$WARMUP"
    --temperature "$TEMPERATURE"
    --prompt_max_len "$PROMPT_MAX_LEN"
    --generate_max_len "$GENERATE_MAX_LEN"
    --engine_type vllm
    --engine_tp_size "$ENGINE_TP"
    --engine_mem_util "$ENGINE_MEM_UTIL"
    --eval_steps "$EVAL_STEPS"
    --save_steps "$SAVE_STEPS"
    --save_trajectories
    --wandb_project "$WANDB_PROJECT"
    --wandb_run_name "$run"
    "${precision[@]}" "${wandb[@]}" "${resume[@]}" "$@"
)

if [ "$plan" = 1 ]; then # one process answers for all ranks
    export WORLD_SIZE="$((MLP_WORKER_NUM * MLP_WORKER_GPU))" RANK="$((MLP_ROLE_INDEX * MLP_WORKER_GPU))"
    exec "$PYTHON" "$here/train_colocate.py" "${flags[@]}"
fi

probe='import socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("", int(sys.argv[1]))); print(s.getsockname()[1])'
wanted="${MLP_WORKER_0_PORT:-$((MLP_WORKER_NUM > 1 ? 20092 : 0))}"   # 0: any free one
MLP_WORKER_0_PORT="$wanted"
if [ "$MLP_ROLE_INDEX" = 0 ] && ! MLP_WORKER_0_PORT="$("$PYTHON" -c "$probe" "$wanted" 2>/dev/null)"; then
    echo "port $wanted cannot be used on this node: set MLP_WORKER_0_PORT to a free one, the same on all nodes" >&2
    exit 2
fi

log="rft_logs/${EXPERIMENT_NAME}/node${MLP_ROLE_INDEX}_$(date +%Y%m%d_%H%M%S).log"
mkdir -p "$save_path" "$(dirname "$log")"
# Slurm and a terminal's Ctrl-C send their signal to all processes, of which only the training must handle it (see
# below): tee has to log what is printed after the signal, and SIGUSR1 would end torchrun.
trap '' USR1
exec > >(trap '' INT TERM && exec tee "$log") 2>&1

"$PYTHON" -m torch.distributed.run \
    --nnodes "$MLP_WORKER_NUM" \
    --nproc-per-node "$MLP_WORKER_GPU" \
    --node-rank "$MLP_ROLE_INDEX" \
    --master-addr "$MLP_WORKER_0_HOST" \
    --master-port "$MLP_WORKER_0_PORT" \
    "$here/train_colocate.py" "${flags[@]}" &
torchrun=$!

# After SIGUSR1, SIGTERM or Ctrl-C the training saves its state and ends by itself. SIGUSR1 would end torchrun; after
# the others torchrun would give the training only 30 s. So this script sends them directly to torchrun's children.
stopped=0
pass_on() {
    stopped=$2
    for pid in $(cat "/proc/$torchrun/task/"*/children 2>/dev/null); do
        kill "-$1" "$pid" 2>/dev/null || true
    done
}
trap 'pass_on USR1 138' USR1
trap 'pass_on TERM 143' TERM
trap 'pass_on INT 130' INT
status=0
while kill -0 "$torchrun" 2>/dev/null; do # a trapped signal ends the wait early
    status=0
    wait "$torchrun" || status=$?
done
if [ "$status" -ne 0 ] && [ "$stopped" -ne 0 ]; then
    status=$stopped
fi
exit "$status"
