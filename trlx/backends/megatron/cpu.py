"""Runs Megatron-Core without CUDA, over gloo, to try parallel sizes on any machine.

A few modules of Megatron-Core ask for CUDA devices. Without a GPU, the name ``torch`` in these modules is replaced by
an object that forwards to torch and uses the CPU instead. torch itself is not changed.

The list of modules fits version `VERSION` of Megatron-Core; other versions are refused. With CUDA nothing is replaced.
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
"""The supported version of megatron-core, without its patch number."""

MODULES = """
    utils tensor_parallel.mappings tensor_parallel.layers tensor_parallel.random pipeline_parallel.schedules
    pipeline_parallel.p2p_communication transformer.utils transformer.attention
    models.common.embeddings.rotary_pos_embedding distributed.param_and_grad_buffer optimizer.optimizer
    optimizer.clip_grads optimizer.grad_scaler
""".split()
"""Modules of megatron.core that use CUDA by name."""

OTHERS = ("models.gpt", "models.gpt.gpt_layer_specs", "distributed", "optimizer", "inference.contexts")
"""More modules that warn when they are imported."""


def prepare_engine() -> None:
    """Imports Megatron-Core without its warnings and, without CUDA, makes it run on CPUs. Safe to call again.

    Raises:
        ImportError: megatron-core has an unsupported version, or imports a broken package.
    """
    _check_version()
    _import_quietly()
    _ignore_its_own_calls()
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", "When using .* it is recommended to set .* CUDA_DEVICE_MAX_CONNECTIONS")
        _stand_in()


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Without CUDA, ``tensor.type()`` returns CUDA's names inside the block: Megatron-Core's bf16 optimizers compare
    them when they are built."""
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
            "megatron.core can be imported but is not installed (a checkout of Megatron-LM on the path?), so its "
            f'version is unknown: run pip install "megatron-core~={VERSION}.1", or pip install the checkout'
        ) from error
    if found.rpartition(".")[0] != VERSION:
        raise ImportError(
            f"megatron-core {found} is installed, but trlx supports {VERSION} only: "
            f'run pip install "megatron-core~={VERSION}.1"'
        )


def _import_quietly() -> None:
    # Megatron-Core warns of every optional kernel package that is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in (*MODULES, *OTHERS):
                importlib.import_module(f"megatron.core.{name}")
        except RuntimeError as error:
            raise ImportError(
                "megatron-core cannot be imported, because it imports a broken package, often an empty "
                f"transformer-engine (pip uninstall transformer-engine): {error}"
            ) from error
    for name in ("tensor_parallel.random", "optimizer", "distributed.param_and_grad_buffer"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)


def _ignore_its_own_calls() -> None:
    # warnings about calls inside Megatron-Core, which users cannot change
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
    """Scales gradients to `max_norm`. Megatron-Core's own function needs CUDA tensors."""
    factor = max_norm / (total_norm + 1e-6)
    if factor >= 1:
        return
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


class _Forwarding(types.ModuleType):
    """A module that forwards to another one, with some attributes replaced."""

    def __init__(self, original: types.ModuleType, **changed: Any):
        super().__init__(original.__name__)
        self.__dict__.update(changed, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _on_cpu(factory: Any) -> Any:
    """`factory`, e.g. ``torch.zeros``, with the device "cuda" replaced by "cpu"."""

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
