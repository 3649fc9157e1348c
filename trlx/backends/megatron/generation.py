"""Sampling with the pipeline stages and a key-value cache on each; the weights are not copied.

Rows are divided into one group per stage, so that all stages work at once. The last stage draws the tokens and sends
them to the others. Each row and token has its own uniform number from one seed, so results do not depend on the
parallel sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn

from trlx.backends.megatron.model import PolicyStage
from trlx.backends.megatron.parallel import ParallelState, pipeline_group
from trlx.batch import Sample
from trlx.data.collate import left_pad
from trlx.data.store import own_rows
from trlx.sampling.base import Sampler
from trlx.sampling.drawing import Drawing, uniforms
from trlx.sampling.rules import KNOWN, Rules
from trlx.sampling.settings import SamplingConfig, cut_at_eos


class PipelineSampler(Sampler):
    """Samples from the stages that train."""

    def __init__(self, stage: list[PolicyStage], parallel: ParallelState, has_q: bool, vocab_size: int):
        self.stage, self.parallel = stage, parallel
        self.has_q, self.vocab_size = has_q, vocab_size

    def check(self, sampling: SamplingConfig) -> None:
        for name in sampling.extra:
            if name not in KNOWN:
                raise ValueError(
                    f"{sampling.where}.{name} does not work with a NeMo trainer, which knows {', '.join(KNOWN)}"
                )
        sampling.check_shaping(self.has_q, self.vocab_size)
        Rules(sampling, self.parallel.device)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        """The same samples on every process that holds a part of the model."""
        self.check(sampling)
        self.parallel.require_groups()
        seed = self.parallel.from_leader(int(torch.randint(2**62, ())))
        for chunk in self.stage:
            chunk.eval()
        responses = self._responses(prompts, sampling, seed) if prompts else []
        return [Sample(ids, version=self.version) for ids in responses]

    def _responses(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[list[int]]:
        stage, parallel = self.stage, self.parallel
        numbers = uniforms(seed, len(prompts), sampling.max_new_tokens)
        groups = []
        for i in range(parallel.sizes.pipeline):
            rows = own_rows(len(prompts), i, parallel.sizes.pipeline)
            if prompts[rows]:
                own = numbers[rows].to(parallel.device)
                groups.append(_Group(prompts[rows], sampling, own, parallel.device, stage[-1].heads))
        pipeline = _Pipeline(stage, parallel, groups)
        with _whole_sequences(stage):
            for _ in range(sampling.max_new_tokens):
                for group in groups:
                    pipeline.advance(group)
        pipeline.finish()
        return [response for group in groups for response in group.responses]


@dataclass
class _Group:
    """Rows that go through the pipeline together."""

    prompts: list[list[int]]
    sampling: SamplingConfig
    uniforms: Tensor
    device: torch.device
    heads: nn.ModuleDict | None
    context: StaticInferenceContext = field(init=False)
    drawn: list[Tensor] = field(default_factory=list)
    """int64 [3, B] for each step: tokens, whether the row was done before, and after."""
    awaits: bool = False
    """True until this stage has received the last step's tokens from the last stage."""

    def __post_init__(self) -> None:
        tokens, mask = left_pad(self.prompts, self.sampling.pad_token_id)
        self.tokens, self.real = tokens.to(self.device), mask.bool().to(self.device)
        self.context = StaticInferenceContext(len(self.prompts), tokens.shape[1] + self.sampling.max_new_tokens)
        self.drawing = Drawing(self.sampling, self.prompts, self.uniforms, self.heads)

    @property
    def finished(self) -> bool:
        """Whether all rows are done."""
        return bool(self.drawn) and bool(self.drawn[-1][2].all())

    @property
    def responses(self) -> list[list[int]]:
        drawn = torch.stack(self.drawn).tolist() if self.drawn else []
        rows = range(len(self.prompts))
        ids = [[step[0][row] for step in drawn if not step[1][row]] for row in rows]
        return [cut_at_eos(each, self.sampling.eos_token_ids) for each in ids]

    def inputs(self) -> dict[str, Tensor]:
        """The model's inputs for the tokens that are not in the cache."""
        start, end = self.context.sequence_len_offset, self.tokens.shape[1]
        real = self.real
        seen = torch.ones(end - start, end, dtype=torch.bool, device=self.device).tril(start)
        visible = seen & real[:, None, :]
        # let padding see itself: softmax over no keys is NaN
        itself = torch.arange(end, device=self.device) == torch.arange(start, end, device=self.device)[:, None]
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        return {
            "tokens": self.tokens[:, start:],
            "positions": positions[:, start:],
            "attention_mask": ~(visible | itself)[:, None],
        }

    def take(self, drawn: Tensor) -> None:
        """Appends one token to each row."""
        self.drawn.append(drawn)
        self.tokens = torch.cat([self.tokens, drawn[0][:, None]], dim=1)
        self.real = torch.cat([self.real, torch.ones_like(self.real[:, :1])], dim=1)
        self.awaits = False


class _Pipeline:
    """Receives, computes and sends a group's hidden states and tokens on this stage.

    Sends are asynchronous: two processes never wait for each other.
    """

    def __init__(self, stage: list[PolicyStage], parallel: ParallelState, groups: list[_Group]):
        self.stage, self.parallel, self.groups = stage, parallel, groups
        self.ranks = dist.get_process_group_ranks(pipeline_group())
        self.sent: list[tuple[dist.Work, Tensor]] = []

    def advance(self, group: _Group) -> None:
        """Computes one more token for each row of a group, unless all its rows are done."""
        self._receive_tokens(group)
        if group.finished:
            return
        inputs, size = group.inputs(), len(self.ranks)
        for chunk in self.stage:
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive_states(chunk, inputs["tokens"].shape))
            output = chunk(**inputs, inference_context=group.context)
            if not chunk.post_process:
                self._send_states(output, (self.parallel.stage + 1) % size)
                continue
            # only the last stage's last chunk gets here
            drawn = group.drawing.draw(*output)
            for other in range(size - 1):
                self._send(drawn, other, self.parallel.return_group)
            group.context.sequence_len_offset = group.tokens.shape[1]
            group.take(drawn)
            return
        group.context.sequence_len_offset = group.tokens.shape[1]
        group.awaits = True

    def finish(self) -> None:
        """Receives the last tokens and waits for all sends."""
        for group in self.groups:
            self._receive_tokens(group)
        for work, _ in self.sent:
            work.wait()

    def _receive_tokens(self, group: _Group) -> None:
        """Receives the tokens of the group's last step, unless they have arrived."""
        if not group.awaits:
            return
        drawn = torch.empty(3, len(group.prompts), dtype=torch.int64, device=self.parallel.device)
        dist.recv(drawn, self.ranks[-1], group=self.parallel.return_group)
        group.take(drawn)

    def _receive_states(self, chunk: PolicyStage, shape: torch.Size) -> Tensor:
        if self.parallel.stage == 0:
            # interleaved chunks: the last stage sent tokens before these hidden states, so receive them first
            for group in self.groups:
                self._receive_tokens(group)
        rows, columns = shape
        states = torch.empty(
            columns, rows, chunk.config.hidden_size, dtype=chunk.config.params_dtype, device=self.parallel.device
        )
        before = (self.parallel.stage - 1) % len(self.ranks)
        dist.recv(
            states,
            self.ranks[before],
            group=self.parallel.return_group if self.parallel.stage == 0 else pipeline_group(),
        )
        return states

    def _send_states(self, states: Tensor, stage: int) -> None:
        self._send(states, stage, self._group_into(stage))

    def _group_into(self, stage: int) -> dist.ProcessGroup:
        """The group for hidden states that go into `stage`. Into stage 0 they come from the last one."""
        return self.parallel.return_group if stage == 0 else pipeline_group()

    def _send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup) -> None:
        self.sent = [(work, kept) for work, kept in self.sent if not work.is_completed()]
        tensor = tensor.contiguous()
        self.sent.append((dist.isend(tensor, self.ranks[stage], group=group), tensor))


_DIVIDING = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Attributes of Megatron-Core's modules that switch sequence parallelism on."""


@contextmanager
def _whole_sequences(stage: list[PolicyStage]) -> Iterator[None]:
    """Switches sequence parallelism off inside the block: single tokens cannot be divided over tensor ranks."""
    modules = [module for chunk in stage for module in chunk.modules()]
    holders = [*modules, stage[0].config]
    changed = [(holder, name) for holder in holders for name in _DIVIDING if getattr(holder, name, False) is True]
    for holder, name in changed:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name in changed:
            setattr(holder, name, True)
