"""What every process of a test needs, imported once by the fork server that starts them."""

import gc

import torch
import transformers.models.gpt2.modeling_gpt2  # noqa: F401

import trlx.api  # noqa: F401
from trlx.trainer.nemo import megatron_backend

megatron_backend()

# two cores serve several processes at once, and one thread each makes sums come out the same on every machine
torch.set_num_threads(1)

# a collection in a process that is forked would look at, and so copy, all that the imports have made
gc.collect()
gc.freeze()
