"""Heads beside the language model's own, on the last stage: V on every tensor rank, Q by vocabulary columns."""

from __future__ import annotations

import copy

import torch
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
    """New heads, those that are asked for; their first weights depend on `seed` and not on the layout."""
    heads = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if needs.value_head:
            heads["value"] = ValueHead(decoder.hidden_size)
        if needs.q_heads:
            heads["q"] = VocabularyParallelQHeads(QHeads(decoder.hidden_size, decoder.vocab_size, needs.q_heads), shard)
    return heads if len(heads) else None


class VocabularyParallelQHeads(nn.Module):
    """`QHeads` of which every tensor rank holds the rows of its tokens (ILQL, arXiv:2206.11871).

    The first layer of each head is on every rank, the second is split. Weights have the names they have in `QHeads`.
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
        scores = in_chunks(self._scores, hidden.float(), actions, self.heads[0])
        return tuple(scores.chunk(3))

    def lowest_target(self, hidden: Tensor) -> Tensor:
        """The lowest target Q of every token, [N, V] float32, gathered from all tensor ranks."""
        lowest = torch.stack([target(hidden.float()) for target in self.targets]).amin(dim=0)
        return self.shard.gathered(lowest)

    def sync(self, alpha: float) -> None:
        """Moves the targets after the heads: target <- alpha head + (1 - alpha) target."""
        polyak_(self.targets, self.heads, alpha)

    def _scores(self, hidden: Tensor, actions: Tensor) -> Tensor:
        of_heads = [_scored(head, hidden) for head in self.heads]
        q = [self.shard.chosen(each, actions) for each in of_heads]
        target_q = [self.shard.chosen(target(hidden.detach()), actions) for target in self.targets]
        logprobs = [self.shard.logprobs(each, actions) for each in of_heads]
        return torch.stack([*q, *target_q, *logprobs])


def _scored(head: nn.Sequential, hidden: Tensor) -> Tensor:
    """The local columns of `head`; gradients of all columns come together before its first layer."""
    return head[-1](copy_to_tensor_model_parallel_region(head[:-1](hidden), tensor_group()))


def _split(head: nn.Sequential, shard: VocabularyShard) -> nn.Sequential:
    """`head` with only the rows of `part` in its last layer."""
    last = head[-1]
    real = min(max(0, shard.size - shard.first), shard.width)
    mine = nn.Linear(last.in_features, shard.width)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(mine, name).zero_()[:real] = getattr(last, name)[shard.first : shard.first + real]
    return nn.Sequential(*head[:-1], mine)


def _mark(layer: nn.Linear) -> None:
    # what the engine reads to count a gradient norm over tensor ranks once
    for weight in layer.parameters():
        weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
