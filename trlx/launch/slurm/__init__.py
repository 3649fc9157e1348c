"""``trlx submit``: a training run as a job of SLURM."""
