"""Shortest paths on a random graph: a task small enough to see PPO learn in a minute on a laptop."""

from trlx.launch.demo.task import RandomWalks

__all__ = ["RandomWalks"]
