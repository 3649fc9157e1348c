"""Rewards: how the user's reward functions are called, and what is made of what they return; some ready functions."""

from trlx.rewards.functions import ExactMatch, LengthPenalty, NumberMatch, RegexMatch, RepetitionPenalty, last_number
from trlx.rewards.math_match import MathMatch

__all__ = [
    "ExactMatch",
    "LengthPenalty",
    "MathMatch",
    "NumberMatch",
    "RegexMatch",
    "RepetitionPenalty",
    "last_number",
]
