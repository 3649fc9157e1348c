"""Layouts of a run over GPUs: the smallest one that fits, and the line that starts it."""

from __future__ import annotations

import dataclasses

from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.settings import ParallelSizes, Recompute
from trlx.launch.plan.memory import Memory, memory
from trlx.launch.plan.run import Run

PER_NODE = 8
FULL = Recompute("full", "uniform", 1)
SBATCH = "examples/slurm/megatron_{}_node.sbatch"


def fit(run: Run, gpus: int, limit: float) -> Run | None:
    """`run` in the smallest layout whose fullest process holds at most `limit` bytes, or None if no layout does.

    A step keeps its number of rows. Tensor ranks stay within a node of 8 GPUs, and are preferred to pipeline stages,
    which wait for each other. Layers are computed again only if no layout fits without that.
    """
    rows = run.data * run.rows * run.microbatches
    for recompute in (Recompute(), FULL):
        for parallel in _layouts(run.shape, gpus):
            data = gpus // (parallel.tensor * parallel.pipeline)
            if rows % (data * run.rows):
                continue
            microbatches = rows // (data * run.rows)
            tried = dataclasses.replace(
                run, parallel=parallel, data=data, microbatches=microbatches, recompute=recompute
            )
            if fullest(tried).total <= limit:
                return tried
    return None


def fullest(run: Run) -> Memory:
    """Memory of the stage that needs most."""
    return max((memory(run, stage) for stage in run.stages), key=lambda held: held.total)


def launch_line(gpus: int) -> str:
    """The command that starts a job on `gpus` GPUs under SLURM."""
    nodes = -(-gpus // PER_NODE)
    each = gpus if nodes == 1 else PER_NODE
    return f"sbatch --nodes={nodes} --gpus-per-node={each} {SBATCH.format('single' if nodes == 1 else 'multi')}"


def _layouts(shape: DecoderConfig, gpus: int) -> list[ParallelSizes]:
    """Every division of the model: the fewest GPUs per copy first, then the fewest stages."""
    widths = (shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size, gpus)
    tensors = [t for t in (1, 2, 4, 8) if not any(width % t for width in widths)]
    pipelines = [p for p in range(1, shape.num_layers + 1) if shape.num_layers % p == 0]
    found = [(t, p) for t in tensors for p in pipelines if gpus % (t * p) == 0]
    return [ParallelSizes(t, p, None, t > 1) for t, p in sorted(found, key=lambda each: (each[0] * each[1], each[1]))]
