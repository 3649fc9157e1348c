"""The trainers on the Megatron backend. They are always registered: without the toolkit they say what to install."""

from __future__ import annotations

from typing import Any

from trlx.backends.base import Backend
from trlx.optional import require
from trlx.registry import register_trainer
from trlx.strict import check_keywords
from trlx.trainer.base import OURS
from trlx.trainer.grpo import GRPOTrainer
from trlx.trainer.ilql import ILQLTrainer
from trlx.trainer.ppo import PPOTrainer
from trlx.trainer.preferences import DPOTrainer, KTOTrainer
from trlx.trainer.reward import RewardTrainer
from trlx.trainer.sft import SFTTrainer

TOOLKIT = ("megatron.core", "einops")


def megatron_backend() -> type[Backend]:
    """The backend of the NeMo trainers.

    Raises:
        ImportError: the toolkit is not installed, or its version is not supported.
    """
    require(*TOOLKIT, extra="nemo", purpose="Training with NeMo runs on Megatron-Core and")
    from trlx.backends.megatron.cpu import prepare_engine

    prepare_engine()
    from trlx.backends.megatron.backend import MegatronBackend

    return MegatronBackend


class WhenAsked:
    """A class attribute that is `megatron_backend`, which is imported only where it is read."""

    def __get__(self, *_: Any) -> type[Backend]:
        return megatron_backend()


class OnMegatron:
    """A trainer on Megatron. The backend reads its options from ``train.trainer_kwargs``, the trainer gets the rest."""

    backend_class = WhenAsked()

    def __init__(self, *args: Any, **kwargs: Any):
        options = self.backend_class.options
        asked = [key for key in kwargs if key not in OURS]
        check_keywords(super().__init__, asked, "train.trainer_kwargs", ours=OURS, besides=options)
        super().__init__(*args, **{key: value for key, value in kwargs.items() if key not in options})


@register_trainer
class NeMoPPOTrainer(OnMegatron, PPOTrainer):
    """PPO with tensor and pipeline parallelism."""


@register_trainer
class NeMoGRPOTrainer(OnMegatron, GRPOTrainer):
    """GRPO and its relatives with tensor and pipeline parallelism."""


@register_trainer
class NeMoILQLTrainer(OnMegatron, ILQLTrainer):
    """ILQL with tensor and pipeline parallelism."""


@register_trainer
class NeMoSFTTrainer(OnMegatron, SFTTrainer):
    """Supervised fine-tuning with tensor and pipeline parallelism."""


@register_trainer
class NeMoDPOTrainer(OnMegatron, DPOTrainer):
    """Direct preference optimization with tensor and pipeline parallelism."""


@register_trainer
class NeMoRewardTrainer(OnMegatron, RewardTrainer):
    """Reward models with tensor and pipeline parallelism."""


@register_trainer
class NeMoKTOTrainer(OnMegatron, KTOTrainer):
    """Kahneman-Tversky optimization with tensor and pipeline parallelism."""
