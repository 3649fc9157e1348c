"""Shortest paths on a random graph: a task small enough to see PPO learn in a minute on a laptop."""

from examples.randomwalks.task import RandomWalks

__all__ = ["RandomWalks"]
