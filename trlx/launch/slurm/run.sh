# To be sourced by a batch script. `run MODULE [ARGUMENTS ...]` trains on all nodes of the job: it starts torchrun once on every
# node, and requeues the job if its time or one of its nodes was lost. `#SBATCH --signal=B:USR1@300` tells the script that its
# time is over soon. Settings are variables:
#
#   PYTHON     the interpreter; default: python
#   INSIDE     array: a command that runs the interpreter in a container
#   STEP       array: more options for srun
#   PORT       where the processes meet on the first node; default: 10000 + job id modulo 20000
#   REQUEUES   how often the job may be requeued; default: 100

asked=""
trap 'asked=yes' USR1

run() {
    local module=$1 gpus=${SLURM_GPUS_ON_NODE:-0} first address processes
    shift
    processes=$((gpus > 0 ? gpus : 1))
    # a node may be known to SLURM by another name than to the network
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*')

    # as many threads as there are cores for each process; torchrun says 1 where nothing is said
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-1} / processes > 1 ? SLURM_CPUS_ON_NODE / processes : 1))}
    # tokenizers' threads and the processes that a reward function may start do not go together
    export TOKENIZERS_PARALLELISM=false
    # else torch prints its C++ stack on every node but the first when that one has ended
    export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
    # srun no longer takes it over from sbatch (since SLURM 22.05), and would give every node's processes a single core
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

    # --wait: where one node fails, the others would wait for its processes
    # trap: a signal that comes before training has begun to listen would end the process
    requeued srun --ntasks-per-node=1 --wait=120 "${STEP[@]}" bash -c 'trap "" USR1; exec "$@"' task \
        "${INSIDE[@]}" "${PYTHON:-python}" -m trlx.backends.torchrun \
        --nnodes "$SLURM_NNODES" --nproc-per-node "$processes" --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
        --rdzv-endpoint "${address#*=}:${PORT:-$((10000 + SLURM_JOB_ID % 20000))}" \
        -m "$module" "$@" train.resume_from_checkpoint=auto
}

# `requeued srun ...` runs a step. It passes SIGUSR1 to the step, and requeues the job if that can go on in another start.
requeued() {
    local step code why=""
    if ((${SLURM_RESTART_COUNT:-0} > ${REQUEUES:-100})); then
        echo "This job was requeued ${REQUEUES:-100} times, which is the limit (REQUEUES); submit it again to go on" >&2
        return 1
    fi
    "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        # srun passes it to all processes; it is sent until the step ends, since processes that do not train yet ignore it
        if [ -n "$asked" ]; then kill -USR1 "$step" 2>/dev/null; fi
        sleep 1
    done
    wait "$step"
    code=$?
    if ((code == 75)); then
        why="the run was asked to save and stop"
    elif ((code != 0)) && ! timeout 60 srun --overlap --ntasks-per-node=1 true; then
        # SLURM learns of a dead node only after SlurmdTimeout; by then the processes of the other nodes have failed
        why="a node does not answer"
    fi
    if [ -n "$why" ]; then
        echo "Job $SLURM_JOB_ID is requeued: $why" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
