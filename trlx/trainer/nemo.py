"""The NeMo trainers: always registered, so that a config naming one gets an explanation where the toolkit is absent."""

from __future__ import annotations

from typing import Any

from trlx.optional import require
from trlx.registry import register_trainer

TOOLKIT = ("megatron.core", "einops")


def megatron_backend() -> type:
    """The backend of the NeMo trainers.

    Raises:
        ImportError: the toolkit is not installed.
        NotImplementedError: it is.
    """
    require(*TOOLKIT, extra="nemo", purpose="Training with NeMo runs on Megatron-Core and")
    raise NotImplementedError(
        "The Megatron backend is not part of this version of trlx; set train.trainer to an Accelerate trainer"
    )


class NeMoTrainer:
    """What the three have in common."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.backend_class = megatron_backend()


@register_trainer
class NeMoPPOTrainer(NeMoTrainer):
    """PPO with tensor and pipeline parallelism."""


@register_trainer
class NeMoILQLTrainer(NeMoTrainer):
    """ILQL with tensor and pipeline parallelism."""


@register_trainer
class NeMoSFTTrainer(NeMoTrainer):
    """Supervised fine-tuning with tensor and pipeline parallelism."""
