# Sourced by the sbatch files beside it. `run MODULE [ARGUMENTS ...]` starts torchrun once on every node of the job and,
# where the run saved itself before its time was over, puts the job back into the queue.

source examples/slurm/requeue.sh

run() {
    local module=$1 gpus=${SLURM_GPUS_ON_NODE:-8} head port
    shift
    # the processes of all nodes meet at the first one, where other jobs may run, too
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=${PORT:-$((10000 + SLURM_JOB_ID % 20000))}

    # as many threads as there are cores for each process; torchrun says 1 where nothing is said
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-gpus} / gpus))}
    # tokenizers' threads and the processes that a reward function may start do not go together
    export TOKENIZERS_PARALLELISM=false
    # srun no longer takes it over from sbatch (since SLURM 22.05), and would give every node's processes a single core
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    # nodes without a way out: the model and the data must be in the cache, and nothing waits for a connection
    # export HF_HUB_OFFLINE=1 WANDB_MODE=offline

    mkdir -p logs
    # --open-mode: a job that was requeued goes on in the same files
    # --wait: where one node fails, the others would wait for its processes
    # trap: a signal that comes before training has begun to listen would end the process
    requeued srun --ntasks-per-node=1 --wait=120 --open-mode=append --output="logs/%x-%j-node%n.log" \
        bash -c 'trap "" USR1; exec "$@"' task \
        "${PYTHON:-python}" examples/slurm/launch.py --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" \
        --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:$port" \
        -m "$module" train.resume_from_checkpoint=auto "$@"
}
