# Sourced. `requeued srun ...` runs a step of the job. It hands on the SIGUSR1 that `#SBATCH --signal=B:USR1@300` sends to
# the batch script, and where the run saved itself because of it, puts the job back into the queue.

asked=""
trap 'asked=yes' USR1

requeued() {
    local step code
    "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        # srun passes it on to all processes; those that do not train yet ignore it, and so it is sent until the step ends
        if [ -n "$asked" ]; then kill -USR1 "$step" 2>/dev/null; fi
        sleep 5
    done
    wait "$step"
    code=$?
    # saved at the end of a step because it was asked to; anything else would fail again
    if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
    return "$code"
}
