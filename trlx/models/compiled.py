"""The transformer blocks of a policy, compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain

import torch

from trlx.models.decoder import block_lists
from trlx.models.heads import ValueBranch
from trlx.models.policy import Policy

COMPILER = "inductor"
"""torch's name of what compiles."""
MOST_GRAPHS = 64
"""torch runs code as it is written after 8 graphs of it, and one serves all blocks: with gradients, without, ..."""


def compile_blocks(policy: Policy) -> Callable[[], AbstractContextManager]:
    """Compiles the blocks of `policy`, also those of its value branch, when they first run, for all widths at once.

    Hooks stay outside, and names of weights stay as they are. Do it after all checks that run the model.

    Returns:
        What makes a context in which the blocks run as they are written.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    branch = policy.value_head.blocks if isinstance(policy.value_head, ValueBranch) else []
    for block in chain(*block_lists(policy.model), branch):
        block.forward = torch.compile(block.forward, dynamic=True, backend=COMPILER)
    return partial(torch.compiler.set_stance, "force_eager")
