"""Trainers. A trainer of your own is registered with ``register_trainer``, here as in the original."""

from trlx.registry import register_trainer

__all__ = ["register_trainer"]
