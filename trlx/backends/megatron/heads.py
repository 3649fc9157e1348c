"""The heads on the last stage. Every tensor rank has those of values and scores; Q is sharded by vocabulary."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from trlx.backends.base import ModelNeeds
from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.parallel import tensor_group
from trlx.backends.megatron.vocabulary import VocabularyShard
from trlx.methods.ilql import polyak_
from trlx.models.heads import QHeads, ValueHead
from trlx.models.logprobs import in_chunks


def make_heads(decoder: DecoderConfig, shard: VocabularyShard, needs: ModelNeeds, seed: int) -> nn.ModuleDict | None:
    """The heads in `needs`. Their first weights depend on `seed`, and not on the parallel sizes."""
    heads = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if needs.value_head:
            heads["value"] = ValueHead(decoder.hidden_size)
        if needs.q_heads:
            heads["q"] = VocabularyParallelQHeads(QHeads(decoder.hidden_size, decoder.vocab_size, needs.q_heads), shard)
        if needs.score_head:
            heads["score"] = ScoreHead(decoder.hidden_size, decoder.init_std)
    return heads if len(heads) else None


class ScoreHead(nn.Module):
    """One number for a state: the linear layer ``score`` of the classifiers of transformers, in float32.

    Its first weights are those that transformers draws from the same seed.
    """

    def __init__(self, hidden: int, init_std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden).normal_(std=init_std))

    def forward(self, states: Tensor) -> Tensor:
        """Scores [N] float32 of states [N, d]."""
        return F.linear(states.float(), self.weight).squeeze(-1)


class VocabularyParallelQHeads(nn.Module):
    """`QHeads` sharded by vocabulary (ILQL, arXiv:2206.11871).

    The first layer of each head is replicated, the second is sharded. Weights are named as in `QHeads`.
    """

    def __init__(self, whole: QHeads, shard: VocabularyShard):
        super().__init__()
        self.shard = shard
        self.heads = nn.ModuleList(_split(head, shard) for head in whole.heads)
        self.targets = copy.deepcopy(self.heads).requires_grad_(False)
        for module in (self.heads, self.targets):
            for head in module:
                _mark(head[-1])

    def forward(self, hidden: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, target Q and log softmax(Q) of `actions` [N] in the states `hidden` [N, d]; each [heads, N] float32."""
        values = in_chunks(self._q_and_logprobs, hidden.float(), actions, self.heads[0])
        return tuple(values.chunk(3))

    def lowest_target(self, hidden: Tensor) -> Tensor:
        """The lowest target Q of every token, [N, V] float32, gathered from all tensor ranks."""
        lowest = torch.stack([target(hidden.float()) for target in self.targets]).amin(dim=0)
        return self.shard.gathered(lowest)

    def sync(self, alpha: float) -> None:
        """target <- alpha head + (1 - alpha) target."""
        polyak_(self.targets, self.heads, alpha)

    def _q_and_logprobs(self, hidden: Tensor, actions: Tensor) -> Tensor:
        columns = [_columns(head, hidden) for head in self.heads]
        q = [self.shard.chosen(each, actions) for each in columns]
        target_q = [self.shard.chosen(target(hidden.detach()), actions) for target in self.targets]
        logprobs = [self.shard.logprobs(each, actions) for each in columns]
        return torch.stack([*q, *target_q, *logprobs])


def _columns(head: nn.Sequential, hidden: Tensor) -> Tensor:
    """Q of this rank's tokens. The backward pass sums over tensor ranks before the first layer."""
    return head[-1](copy_to_tensor_model_parallel_region(head[:-1](hidden), tensor_group()))


def _split(head: nn.Sequential, shard: VocabularyShard) -> nn.Sequential:
    """`head` with this rank's rows of the last layer."""
    last = head[-1]
    real = min(max(0, shard.size - shard.first), shard.width)
    mine = nn.Linear(last.in_features, shard.width)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(mine, name).zero_()[:real] = getattr(last, name)[shard.first : shard.first + real]
    return nn.Sequential(*head[:-1], mine)


def _mark(layer: nn.Linear) -> None:
    # Megatron-Core's gradient norm counts marked weights on every tensor rank, and others once
    for weight in layer.parameters():
        weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
