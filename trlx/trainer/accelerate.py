"""The trainers on the Accelerate backend, by the names configs use."""

from __future__ import annotations

from trlx.backends.accelerate import AccelerateBackend
from trlx.registry import register_trainer
from trlx.trainer.grpo import GRPOTrainer
from trlx.trainer.ilql import ILQLTrainer
from trlx.trainer.ppo import PPOTrainer
from trlx.trainer.preferences import DPOTrainer, KTOTrainer
from trlx.trainer.reward import RewardTrainer
from trlx.trainer.rft import RFTTrainer
from trlx.trainer.sft import SFTTrainer


@register_trainer
class AcceleratePPOTrainer(PPOTrainer):
    """PPO on Hugging Face models."""

    backend_class = AccelerateBackend


@register_trainer
class AccelerateGRPOTrainer(GRPOTrainer):
    """GRPO and its relatives on Hugging Face models."""

    backend_class = AccelerateBackend


@register_trainer
class AccelerateSFTTrainer(SFTTrainer):
    """Supervised fine-tuning of Hugging Face models."""

    backend_class = AccelerateBackend


@register_trainer
class AccelerateILQLTrainer(ILQLTrainer):
    """ILQL on Hugging Face models."""

    backend_class = AccelerateBackend


@register_trainer
class AccelerateRFTTrainer(RFTTrainer):
    """Rejection fine-tuning of Hugging Face models."""

    backend_class = AccelerateBackend


@register_trainer
class AccelerateDPOTrainer(DPOTrainer):
    """Direct preference optimization of Hugging Face models."""

    backend_class = AccelerateBackend


@register_trainer
class AccelerateRewardTrainer(RewardTrainer):
    """Reward models from Hugging Face models."""

    backend_class = AccelerateBackend


@register_trainer
class AccelerateKTOTrainer(KTOTrainer):
    """Kahneman-Tversky optimization of Hugging Face models."""

    backend_class = AccelerateBackend
