"""Lets Megatron-Core run without CUDA, over gloo: to try a parallel layout on any machine before paying for GPUs.

Megatron-Core names CUDA in a few places of otherwise portable code. Where there is no GPU, those modules, and no
others, get a stand-in for the name ``torch`` that forwards everything and answers "cpu" in these places. torch itself
stays as it is: Accelerate and transformers live in the same process.

The list fits the engine version `VERSION`; another one is refused, as a place left out could be silently wrong. With
CUDA nothing here is touched.
"""

from __future__ import annotations

import functools
import importlib
import logging
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

VERSION = "0.16"
"""The version of megatron-core, without its last number, whose uses of CUDA are those below."""

MODULES = """
    utils tensor_parallel.mappings tensor_parallel.layers tensor_parallel.random pipeline_parallel.schedules
    pipeline_parallel.p2p_communication transformer.utils transformer.attention
    models.common.embeddings.rotary_pos_embedding distributed.param_and_grad_buffer optimizer.optimizer
    optimizer.clip_grads optimizer.grad_scaler
""".split()
"""Modules of megatron.core that name CUDA and are used here."""

OTHERS = ("models.gpt", "models.gpt.gpt_layer_specs", "distributed", "optimizer", "inference.contexts")
"""Further modules that warn when they are imported."""


def prepare_engine() -> None:
    """Makes Megatron-Core importable in silence and, without CUDA, runnable. Safe to call again.

    Raises:
        ImportError: megatron-core is of a version this was not tried with, or a package that it finds is broken.
    """
    _check_version()
    _import_quietly()
    _ignore_its_own_calls()
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", "When using .* it is recommended to set .* CUDA_DEVICE_MAX_CONNECTIONS")
        _stand_in()


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Inside the block ``tensor.type()`` names CUDA's types: Megatron-Core's bf16 optimizers compare these names when
    they are built. Does nothing where there is CUDA."""
    if torch.cuda.is_available():
        yield
        return
    original = Tensor.type

    def renamed(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    Tensor.type = renamed
    try:
        yield
    finally:
        Tensor.type = original


def _check_version() -> None:
    try:
        found = version("megatron-core")
    except PackageNotFoundError as error:
        raise ImportError(
            "megatron.core can be imported, but is not installed (a checkout of Megatron-LM on the path?), so its "
            f'version is unknown: pip install "megatron-core~={VERSION}.1", or pip install the checkout'
        ) from error
    if found.rpartition(".")[0] != VERSION:
        raise ImportError(
            f"megatron-core {found} is installed, but this trlx was tried with {VERSION} only: "
            f'pip install "megatron-core~={VERSION}.1"'
        )


def _import_quietly() -> None:
    # it tells of every optional kernel package that is missing, several times over
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in (*MODULES, *OTHERS):
                importlib.import_module(f"megatron.core.{name}")
        except RuntimeError as error:
            raise ImportError(
                "megatron-core cannot be imported, because a package it looks for is installed but does not work "
                f"(an empty transformer-engine is the usual one: pip uninstall transformer-engine): {error}"
            ) from error
    for name in ("tensor_parallel.random", "optimizer", "distributed.param_and_grad_buffer"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)


def _ignore_its_own_calls() -> None:
    # what the engine's modules leave out when they call each other, and old names of torch that they use: hundreds of
    # lines in the first case, and nothing that a user can change
    for message in ("Warning: tp_group is None", "MLP requires ffn_hidden_size"):
        warnings.filterwarnings("ignore", message, DeprecationWarning, r"megatron\.core\.")
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)


@functools.cache
def _stand_in() -> None:
    for name in MODULES:
        importlib.import_module(f"megatron.core.{name}").torch = CPU_TORCH
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    importlib.import_module("megatron.core.optimizer.optimizer").clip_grad_by_total_norm_fp32 = _clip
    Tensor.cuda = lambda self, *_, **__: self  # models.common.language_module calls it on tied embeddings


def _clip(parameters: list[Tensor] | Tensor, max_norm: float, total_norm: float, *_: Any, **__: Any) -> None:
    """Scales gradients to `max_norm`; the engine's own insists on CUDA tensors."""
    factor = max_norm / (total_norm + 1e-6)
    if factor >= 1:
        return
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


class _Forwarding(types.ModuleType):
    """A module that has everything of another one, but for what is set on it."""

    def __init__(self, original: types.ModuleType, **changed: Any):
        super().__init__(original.__name__)
        self.__dict__.update(changed, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _on_cpu(factory: Any) -> Any:
    """`factory` (``torch.zeros`` ...) with the device "cuda" taken for "cpu"."""

    @functools.wraps(factory)
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return factory(*args, device="cpu" if device == "cuda" else device, **kwargs)

    return made


CPU_TORCH = _Forwarding(
    torch,
    cuda=_Forwarding(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *_, **__: None,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        manual_seed=torch.manual_seed,
    ),
    **{name: _on_cpu(getattr(torch, name)) for name in ("zeros", "ones", "tensor", "empty")},
)
