# To be sourced by a batch script. `run MODULE [ARGUMENTS ...]` trains on all nodes of the job: it starts torchrun once on every
# node, and requeues the job if its time or one of its nodes was lost. `#SBATCH --signal=B:USR1@300` tells the script that its
# time is over soon. Settings are variables:
#
#   PYTHON     the interpreter; default: python
#   INSIDE     array: a command that runs the interpreter in a container
#   STEP       array: more options for srun
#   PORT       where the processes meet on the first node; default: 10000 + job id modulo 20000
#   SERVE      array: the command of a vLLM server on port 8000, which draws the samples of the run
#   SERVERS    how many of the job's nodes, the last ones, run it; the others train
#   REQUEUES   how often the job may be requeued; default: 100

asked=""
trap 'asked=yes' USR1

run() {
    local module=$1 gpus=${SLURM_GPUS_ON_NODE:-0} servers=${SERVERS:-0} nodes where=() serving="" code processes host
    shift
    processes=$((gpus > 0 ? gpus : 1))
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if ((servers)); then
        where=("--nodes=$servers" "--nodelist=$(joined "${nodes[@]: -servers}")")
        set -- "$@" "train.sampler.url=[$(for host in "${nodes[@]: -servers}"; do echo "http://$(address "$host"):8000"; done | paste -sd,)]"
        srun --ntasks-per-node=1 "${where[@]}" "${SERVE[@]}" &
        serving=$!
        nodes=("${nodes[@]:0:${#nodes[@]}-servers}")
        where=("--nodes=${#nodes[@]}" "--nodelist=$(joined "${nodes[@]}")")
    fi

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
    requeued srun --ntasks-per-node=1 --wait=120 "${where[@]}" "${STEP[@]}" bash -c 'trap "" USR1; exec "$@"' task \
        "${INSIDE[@]}" "${PYTHON:-python}" -m trlx.backends.torchrun \
        --nnodes "${#nodes[@]}" --nproc-per-node "$processes" --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
        --rdzv-endpoint "$(address "${nodes[0]}"):${PORT:-$((10000 + SLURM_JOB_ID % 20000))}" \
        -m "$module" "$@" train.resume_from_checkpoint=auto
    code=$?
    if [ -n "$serving" ]; then kill "$serving" 2>/dev/null; fi
    return "$code"
}

# `address NODE`: a node may be known to SLURM by another name than to the network
address() {
    local known
    known=$(scontrol --oneliner show node "$1" | grep -o 'NodeAddr=[^ ]*')
    echo "${known#*=}"
}

joined() {
    local IFS=,
    echo "$*"
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
