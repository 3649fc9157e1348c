# To be sourced. `requeued srun ...` runs a step of the job. `#SBATCH --signal=B:USR1@300` sends SIGUSR1 to the batch script;
# this passes the signal to the step, and requeues the job if the run has saved a checkpoint because of it.

asked=""
trap 'asked=yes' USR1

requeued() {
    local step code
    "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        # srun passes it to all processes; it is sent until the step ends, since processes that do not train yet ignore it
        if [ -n "$asked" ]; then kill -USR1 "$step" 2>/dev/null; fi
        sleep 5
    done
    wait "$step"
    code=$?
    # 75: the run has saved a checkpoint because it was asked to; after any other failure it would fail again
    if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
    return "$code"
}
