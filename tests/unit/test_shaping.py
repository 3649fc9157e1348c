"""ILQL samples from shaped logits on every architecture, and what it adds is what its heads are trained on."""

import pytest
import torch

from tests.builders import responses as sampled
from tests.unit.test_seq2seq import CONFIGS
from tests.unit.tiny_models import FAMILIES, tiny_model
from trlx.models.policy import build_policy, load_model
from trlx.registry import architectures
from trlx.sampling.settings import SamplingConfig

BETA, NEW = 3.0, 4
PROMPT = [5, 6, 7]


def policy_of(name):
    """A tiny policy with two Q heads and a value head that say something."""
    kind = "causal" if name in FAMILIES else "seq2seq"
    architecture = architectures.get(kind)
    model = tiny_model(name) if name in FAMILIES else load_model(CONFIGS[name](), {}, architecture)
    policy = build_policy(model, value_head=True, q_heads=2, architecture=architecture).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.heads.parameters():
            weight.normal_(generator=generator)
    return policy


@torch.no_grad()
def likeliest(policy, beta):
    """The greedy response from log pi + beta (min Q - V), every token from a forward pass without cache."""
    ids, _ = policy.architecture.sampler_inputs([PROMPT], 0)
    row = ids.get("decoder_input_ids", ids["input_ids"])
    read = (ids["input_ids"], torch.ones_like(ids["input_ids"]).bool()) if "decoder_input_ids" in ids else (None, None)
    for _ in range(NEW):
        hidden = policy.architecture.states(row, *read)[:, -1]
        logprobs = policy.logits(hidden).log_softmax(dim=-1)
        first, second = (target(hidden) for target in policy.q_heads.targets)
        shifted = logprobs + beta * (torch.minimum(first, second) - policy.value_head.layers(hidden))
        row = torch.cat([row, shifted.argmax(dim=-1, keepdim=True)], dim=1)
    return row[0, -NEW:].tolist()


@pytest.mark.parametrize("name", [*FAMILIES, *CONFIGS])
def test_sampling_is_shifted_on_every_architecture(name):
    policy = policy_of(name)
    found = {
        beta: sampled(policy, [PROMPT], SamplingConfig(NEW, NEW, do_sample=False, extra={"beta": beta}))
        for beta in (0, BETA)
    }
    assert found == {beta: [likeliest(policy, beta)] for beta in (0, BETA)}
    assert found[0] != found[BETA]
