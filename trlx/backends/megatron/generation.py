"""Sampling with the pipeline stages and a key-value cache on each; the weights are not copied.

Rows are divided into one group per stage, so that all stages work at once. The last stage draws the tokens and sends
them to the others. Each row and token has its own uniform number from one seed, so results do not depend on the
parallel sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
from trlx.sampling.drawing import HELD, Drawing, equal_prompts, uniforms
from trlx.sampling.rules import KNOWN, Rules
from trlx.sampling.settings import SamplingConfig


class PipelineSampler(Sampler):
    """Samples from the stages that train."""

    exact = True

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
        groups = self._drawn(prompts, sampling, seed) if prompts else []
        samples = [group.drawing.sample(row, self.version) for group in groups for row in range(len(group.prompts))]
        return self.parallel.object_from_last_stage(samples)  # it alone knows log-probabilities and values

    def _drawn(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[_Group]:
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
        return groups


@dataclass
class _Group:
    """Rows that go through the pipeline together. Equal prompts are read as one row."""

    prompts: list[list[int]]
    sampling: SamplingConfig
    uniforms: Tensor
    device: torch.device
    heads: nn.ModuleDict | None
    context: StaticInferenceContext = field(init=False)
    awaits: bool = False
    """True until this stage has received the last step's tokens from the last stage."""
    finished: bool = False
    """Whether all rows are done."""

    def __post_init__(self) -> None:
        equal = equal_prompts(self.prompts)
        self.places: list[int] | None = [place for place, rows in enumerate(equal) for _ in rows]
        tokens, mask = left_pad([self.prompts[rows[0]] for rows in equal], self.sampling.pad_token_id)
        self.tokens, self.real = tokens.to(self.device), mask.bool().to(self.device)
        self.context = StaticInferenceContext(len(equal), tokens.shape[1] + self.sampling.max_new_tokens)
        self.drawing = Drawing(self.sampling, self.prompts, self.uniforms, self.heads)
        self.drawing.hold([row for rows in equal for row in rows])

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

    def read(self, output: Any) -> Any:
        """Call it when this stage has computed `inputs`. After the prompts, each row gets its own place.

        Args:
            output: (logits, hidden states) of the last column on the last stage.
        """
        self.context.sequence_len_offset = self.tokens.shape[1]
        at, self.places = self.places, None
        if at is None or len(at) == len(self.tokens):
            return output
        self._pick(at)
        return [each[at] for each in output] if isinstance(output, tuple) else output

    def draw(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """See `Drawing.draw`; with the values of the policy's value head."""
        has_value = self.heads is not None and "value" in self.heads
        return self.drawing.draw(logits, hidden, self.heads["value"](hidden) if has_value else None)

    def take(self, drawn: Tensor) -> None:
        """Appends one token to each row. Rows that are done leave when there are many."""
        self.tokens = torch.cat([self.tokens, drawn[0][:, None]], dim=1)
        self.real = torch.cat([self.real, torch.ones_like(self.real[:, :1])], dim=1)
        self.awaits = False
        held = self.drawing.held
        going = [at for at, done in enumerate(drawn[2].tolist()) if not done]
        self.finished = not going
        if going and len(going) < HELD * len(held):
            self.drawing.hold([held[at] for at in going])
            self._pick(going)

    def _pick(self, at: list[int]) -> None:
        """From now on the rows are those `at` these places."""
        self.tokens, self.real = self.tokens[at], self.real[at]
        self.context.max_batch_size = len(at)
        cache = self.context.key_value_memory_dict
        for layer, pair in cache.items():
            cache[layer] = tuple(each[:, at] for each in pair)


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
        output = group.read(output)
        group.awaits = not self.stage[-1].post_process
        if not group.awaits:
            drawn = group.draw(*output)
            for other in range(size - 1):
                self._send(drawn, other, self.parallel.return_group)
            group.take(drawn)

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
        drawn = torch.empty(3, len(group.drawing.held), dtype=torch.int64, device=self.parallel.device)
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
