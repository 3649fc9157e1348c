"""What a Hugging Face policy holds while it samples, scores and trains, seen by running it on tensors without numbers.

The same classes run as in training, but on torch's fake tensors, which have a shape and a dtype and no memory. So
there is no formula for a family of models. Blocks are alike: one and two of them run, and the others are counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, PretrainedConfig, masking_utils

from trlx.backends.base import ModelNeeds
from trlx.backends.sharding import in_bfloat16
from trlx.batch import TokenOutputs
from trlx.config import ModelConfig
from trlx.data.hub import check_source, no_bars
from trlx.launch.plan.phases import DRAWING
from trlx.models.adapters import AdaptedPolicy, make_adapter
from trlx.models.architecture import FROM_HUB, architecture_for
from trlx.models.cached import Reader
from trlx.models.decoder import blocks, disable_dropout, freeze, hidden_size, output_head
from trlx.models.heads import ValueBranch
from trlx.models.logprobs import Logits
from trlx.models.operations import with_fast_operations
from trlx.models.policy import Policy, make_heads
from trlx.strict import ConfigError

PACKED = {"load_in_4bit": 0.5, "load_in_8bit": 1.0}
"""Bytes of a quantized weight, by the setting of ``model.model_extra_configs``."""


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside the block and still held; the weights are there before."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.peak = 0
        self._sum = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        # weights are held before, and count nothing
        for tensor in (*policy.parameters(), *policy.buffers()):
            self._follow(tensor.untyped_storage(), 0)

    @property
    def now(self) -> int:
        """Bytes that are held."""
        gone = [key for key, (storage, _) in self._held.items() if storage.expired()]
        self._sum -= sum(self._held.pop(key)[1] for key in gone)
        return self._sum

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, out)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._follow(storage, storage.nbytes())

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        self._held[storage._cdata] = StorageWeakRef(storage), size
        self._sum += size
        if self._sum > self.peak:
            self.peak = max(self.peak, self.now)

    @contextlib.contextmanager
    def added(self) -> Iterator[list[int]]:
        """Yields a list that gets, at the end of the block, (bytes that are held more, the most at any moment)."""
        before, self.peak, found = self.now, self.now, []
        with self:
            yield found
        found += [self.now - before, self.peak - before]


@dataclass(frozen=True)
class Weights:
    """The weights of a policy: numbers of them, and bytes."""

    model: int
    """Numbers: those of the language model; a tied embedding counts once."""
    trained: int
    """Numbers that train, heads included."""
    blocks: int
    trained_blocks: int
    output: int
    """Of the output head, also where it is the embedding."""
    heads: int
    """Of value and Q heads, targets included."""
    size: float
    """Bytes of all, heads included."""
    trained_size: float
    reference: float
    """Bytes of those of the language model that train."""
    block_size: float
    """Bytes of one block."""
    outside_size: float
    """Bytes of all weights that are in no block."""
    outside_trained: float
    largest: float
    """Bytes of the largest one."""


@dataclass(frozen=True)
class Pass:
    """Bytes that a pass adds to what is held before it."""

    kept: float
    """Held until the backward pass, or while rows are sampled."""
    temporary: float
    """On top of that, at the worst moment."""


class Rehearsal:
    """One policy on fake tensors.

    Args:
        half: activations are bf16 or fp16.
        sharded: blocks have weights in half precision, as FSDP gathers them.

    Raises:
        ConfigError: the model has an encoder, or cannot run without numbers.
        OSError: there is no model of that name.
    """

    def __init__(self, model: ModelConfig, needs: ModelNeeds, half: bool, sharded: bool):
        self.needs, self.half = needs, half
        self._mode = FakeTensorMode()
        self._found: dict[tuple, Pass] = {}
        with torch.device("meta"), _in_words(model):
            policy, built = _policies(model, needs)
            stack, self.base = blocks(policy.model), max(1, needs.value_layers)
            self.layers = len(stack)
            self.trained_layers = sum(any(w.requires_grad for w in block.parameters()) for block in stack)
            self.weights = _weights(policy, model)
            # the lowest blocks take the place of the top ones, which are alike
            for index, block in enumerate(stack[: self.base + 1] if model.peft_config is None else ()):
                block.requires_grad_(index < self.trained_layers)
            del stack[min(self.base + 1, self.layers) :]
            self.policy = built()
        with self._fake():
            _make_fake(self.policy, set(stack.parameters()) if sharded and half else set())
        for block in stack if sharded and half else ():
            block.register_forward_pre_hook(in_bfloat16)

    def update(self, rows: int, length: int, response: int, checkpointing: bool | str = False) -> Pass:
        """A forward and a backward pass of a microbatch, with ``train.gradient_checkpointing``."""
        return self._by_blocks(_update, rows, length, response, checkpointing)

    def scoring(self, rows: int, length: int, response: int) -> Pass:
        """A forward pass without gradients."""
        return self._by_blocks(_scoring, rows, length, response)

    def sampling(self, rows: int, prompt: int, length: int) -> Pass:
        """Keys and values of `rows` rows of `length` tokens, after prompts of `prompt` tokens were read at once."""
        return self._by_blocks(_sampling, rows, prompt, length)

    def states_size(self, tokens: int) -> int:
        """Bytes of the output of a block for so many tokens."""
        with self._fake(), torch.no_grad():
            return tokens * hidden_size(self.policy.model) * self._block_output().dtype.itemsize

    def _block_output(self) -> Tensor:
        found = []
        hook = blocks(self.policy.model)[0].register_forward_hook(lambda *call: found.append(call[-1]))
        with self.running():
            tokens = torch.zeros(1, 2, dtype=torch.int64)
            self.policy.architecture.states(tokens, None, None)
        hook.remove()
        return found[0][0] if isinstance(found[0], tuple) else found[0]

    def _by_blocks(self, run: Callable[..., _Moments], *sizes: Any) -> Pass:
        if (run, *sizes) not in self._found:
            stack = blocks(self.policy.model)
            with self._fake():
                many, counted = run(self, *sizes), len(stack)
                last = stack[-1]
                if counted > self.base:
                    del stack[-1]
                few = run(self, *sizes)
                if counted > self.base:
                    stack.append(last)
            self._found[run, *sizes] = _extended(few, many, self.base, self.layers, self.trained_layers)
        return self._found[run, *sizes]

    @contextlib.contextmanager
    def _fake(self) -> Iterator[None]:
        # transformers would read from the positions whether rows are packed, and make a mask where it cannot
        packed, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, lambda *_: None
        try:
            with self._mode:
                yield
        finally:
            masking_utils.find_packed_sequence_indices = packed

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The context of a forward pass."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            yield


@dataclass(frozen=True)
class _Moments:
    """Bytes at the moments of a pass that may be the worst."""

    trained: float
    """What is held at all of them for blocks that train: activations, or copies of weights in half precision."""
    every: tuple[float, ...] = (0,)
    """What is held for all blocks at each moment: keys and values. At the last moment they are all there."""
    temporary: tuple[float, ...] = (0,)
    """What is held for one block after the other."""


def _extended(few: _Moments, many: _Moments, base: int, layers: int, trained_layers: int) -> Pass:
    """What `layers` blocks take, from `base` blocks and one block more."""
    trained = few.trained + (trained_layers - base) * (many.trained - few.trained)
    every = [low + (layers - base) * (high - low) for low, high in zip(few.every, many.every, strict=True)]
    worst = max(sum(moment) for moment in zip(every, many.temporary, strict=True))
    return Pass(kept=trained + every[-1], temporary=worst - every[-1])


def _update(rehearsal: Rehearsal, rows: int, length: int, response: int, checkpointing: bool | str) -> _Moments:
    policy = rehearsal.policy.train(rehearsal.needs.dropout or bool(checkpointing))
    if checkpointing:
        policy.architecture.recompute(selective=checkpointing == "selective")
    live, columns = Live(policy), _columns(rows, length, response)
    with live:
        with rehearsal.running():
            outputs = policy(*columns)
        loss = _loss(outputs)
        del outputs
        kept = live.now
        if loss.requires_grad:
            loss.backward()
    for weight in policy.parameters():
        weight.grad = None
    for module in policy.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return _Moments(kept, temporary=(live.peak - kept,))


def _scoring(rehearsal: Rehearsal, rows: int, length: int, response: int) -> _Moments:
    policy = rehearsal.policy.eval()
    live, few, columns = Live(policy), _columns(1, 2, 1), _columns(rows, length, response)
    with torch.no_grad(), rehearsal.running():
        with live.added() as copies:  # autocast keeps its copies of weights that train until it ends
            policy(*few)
        with live.added() as pass_:
            policy(*columns)
    return _Moments(copies[0], temporary=(pass_[1],))


def _sampling(rehearsal: Rehearsal, rows: int, prompt: int, length: int) -> _Moments:
    """Three moments: all prompts are read, the last token is read, a token is drawn."""
    policy = rehearsal.policy.eval()
    live = Live(policy)
    with torch.no_grad(), rehearsal.running():
        with live.added() as copies:
            policy(*_columns(1, 2, 1), values=False)
        with live.added() as reading:
            reader = Reader(policy.model, "cpu")
            reader.join([[0] * prompt] * rows, [1] * rows)
        del reader
        with live.added() as cache:  # one row is read and repeated: this counts what is held, not how it came there
            reader = Reader(policy.model, "cpu")
            reader.join([[0] * (length - 1)], [rows])
        with live.added() as step:
            reader.step(torch.zeros(rows, dtype=torch.int64))
            logits = policy.logits(reader.hidden)
    stepping = max(step[1], logits.numel() * DRAWING)
    return _Moments(copies[0], (reading[0], cache[0]), (reading[1] - reading[0], stepping))


def _columns(rows: int, length: int, response: int) -> tuple[Any, ...]:
    """The policy's arguments for a microbatch."""
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    mask = torch.ones(rows, length, dtype=torch.bool)
    at = torch.zeros(rows * response, dtype=torch.int64)
    return tokens, mask, mask, None, None, (at, at)


def _loss(outputs: TokenOutputs) -> Tensor:
    parts = (outputs.logprobs, outputs.values, outputs.q, outputs.q_logprobs, outputs.last)
    return sum(part.sum() for part in parts if part is not None)


def _policies(model: ModelConfig, needs: ModelNeeds) -> tuple[Policy, Callable[[], Policy]]:
    """(the whole policy, what builds it again after blocks were taken away)."""
    options = model.model_extra_configs
    check_source(model.model_path, "model.model_path", options)
    architecture = architecture_for(model.model_path, model.model_arch_type, options, needs.score_head)
    with no_bars():
        where = {name: value for name, value in options.items() if name in FROM_HUB}
        path = model.model_path
        config = path if isinstance(path, PretrainedConfig) else AutoConfig.from_pretrained(path, **where)
    if config.is_encoder_decoder:
        raise ConfigError(f"trlx plan knows decoders, and {config.model_type} has an encoder too: plan another model")
    dtype = options.get("dtype", options.get("torch_dtype", torch.float32))
    own = with_fast_operations(architecture.loader.from_config(config, dtype=dtype))
    if needs.score_head:
        config.get_text_config().pad_token_id = None
    freeze(own, model.num_layers_unfrozen if model.peft_config is None else -1)
    adapter = None if model.peft_config is None else make_adapter(own, model.peft_config, architecture)
    if not needs.dropout:
        disable_dropout(own)

    def build() -> Policy:
        heads = list(make_heads(own, needs.value_head and not needs.value_layers, 0, needs.q_heads))
        if needs.value_layers:
            heads[0] = _Branch(own, needs.value_layers)
        parts = (*heads, needs.temperature, architecture(own), Logits(output_head(own)))
        return Policy(own, *parts) if adapter is None else AdaptedPolicy(adapter, True, *parts)

    return build(), build


class _Branch(ValueBranch):
    """A value branch without its check, which compares numbers."""

    def _checked_width(self, model: nn.Module) -> int:
        return hidden_size(model)


def _weights(policy: Policy, model: ModelConfig) -> Weights:
    stack = blocks(policy.model)
    packed = next((size for name, size in PACKED.items() if model.model_extra_configs.get(name)), None)
    inside = list(stack.parameters())
    of_linear = {m.weight for block in stack for m in block.modules() if isinstance(m, nn.Linear)} if packed else set()

    def size(weights: Any) -> float:
        own = ((w, packed if w in of_linear and not w.requires_grad else w.element_size()) for w in weights)
        return sum(w.numel() * each for w, each in own)

    def count(weights: Any) -> int:
        return sum(w.numel() for w in weights)

    everything, named = list(policy.parameters()), set(inside)
    trained = [w for w in everything if w.requires_grad]
    outside = [w for w in everything if w not in named]
    return Weights(
        model=count(policy.model.parameters()),
        trained=count(trained),
        blocks=count(inside),
        trained_blocks=count(w for w in inside if w.requires_grad),
        output=output_head(policy.model).weight.numel(),
        heads=0 if policy.heads is None else count(policy.heads.parameters()),
        size=size(everything),
        trained_size=size(trained),
        reference=size(w for w in policy.model.parameters() if w.requires_grad),
        block_size=size(inside) / len(stack),
        outside_size=size(outside),
        outside_trained=size(w for w in outside if w.requires_grad),
        largest=max(size([w]) for w in everything),
    )


def _make_fake(policy: nn.Module, halved: set[Tensor]) -> None:
    """Puts fake tensors in the place of those on the meta device, on which autocast does nothing."""
    made: dict[Tensor, Tensor] = {}
    for module in policy.modules():
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is None:
                continue
            if weight not in made:
                new = torch.empty(weight.shape, dtype=torch.bfloat16 if weight in halved else weight.dtype)
                made[weight] = nn.Parameter(new, weight.requires_grad) if isinstance(weight, nn.Parameter) else new
            (module._parameters if name in module._parameters else module._buffers)[name] = made[weight]


@contextlib.contextmanager
def _in_words(model: ModelConfig) -> Iterator[None]:
    """Says which model cannot run on tensors without numbers."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, NotImplementedError) as error:
        kind = type(error).__name__
        raise ConfigError(
            f"trlx plan cannot run {model.model_path} without numbers ({kind}): plan a model of another family"
        ) from None
