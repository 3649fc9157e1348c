"""The task: walk from a letter to the letter ``a`` along the edges of a random directed graph, in few steps.

Follows the toy problem of Decision Transformer (arXiv:2106.01345, fig. 2) in the form CarperAI's trlx gave it: nodes
are letters, a walk is a string, and one number at the end of a walk tells how close it came to the shortest one.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from string import ascii_lowercase

import numpy as np

GOAL = 0
"""The node every walk should reach, written ``a``."""


class RandomWalks:
    """A random directed graph, walks on it, and the reward for a walk.

    `edges` is bool [num_nodes, num_nodes], True where row -> column is an edge. The goal's row is empty.
    A walk counts its nodes, start and goal included, and is at most `max_length` long.
    """

    def __init__(
        self, num_nodes: int = 21, max_length: int = 10, num_walks: int = 1000, p_edge: float = 0.1, seed: int = 1000
    ):
        if not 2 <= num_nodes <= len(ascii_lowercase):
            raise ValueError(f"num_nodes must be from 2 to {len(ascii_lowercase)}, one letter a node; got {num_nodes}")
        rng = np.random.RandomState(seed)
        self.max_length = max_length
        self.letters = ascii_lowercase[:num_nodes]
        self.edges = _random_edges(rng, num_nodes, p_edge)
        self.walks = [self._random_walk(rng) for _ in range(num_walks)]
        """Walks that choose every step at random, as strings; where luck fails they end before the goal."""

    @property
    def prompts(self) -> list[str]:
        """Every letter but the goal's: the starts."""
        return [letter for node, letter in enumerate(self.letters) if node != GOAL]

    @cached_property
    def shortest(self) -> dict[str, int]:
        """Nodes on the shortest walk from each letter to the goal; letters that cannot reach it are absent."""
        lengths = {GOAL: 1}
        queue = deque([GOAL])
        while queue:
            node = queue.popleft()
            for before in np.flatnonzero(self.edges[:, node]):
                if before not in lengths:
                    lengths[before] = lengths[node] + 1
                    queue.append(before)
        return {self.letters[node]: length for node, length in lengths.items()}

    def length(self, walk: str) -> int | None:
        """Nodes from the start to the first ``a``; None if an edge does not exist or the goal is not reached."""
        path, reached, _ = walk.partition(self.letters[GOAL])
        nodes = [self.letters.find(letter) for letter in path + reached]
        exists = all(a >= 0 and b >= 0 and self.edges[a, b] for a, b in zip(nodes, nodes[1:], strict=False))
        return len(nodes) if reached and exists else None

    def optimality(self, walks: list[str]) -> list[float]:
        """How close each walk comes to the shortest: (max_length - length) / (max_length - shortest), in [0, 1].

        1 for a shortest walk, 0 for one that breaks the rules, never arrives, or arrives no sooner than `max_length`.
        What follows the first ``a`` does not count.
        """
        return [self._optimality(walk) for walk in walks]

    def reward_fn(self, samples: list[str], **kwargs) -> list[float]:
        """Optimality as the reward of ``trlx.train``."""
        return self.optimality(samples)

    def metric_fn(self, samples: list[str], **kwargs) -> dict[str, list[float]]:
        """Optimality, and whether each walk reached the goal along edges that exist."""
        return {
            "optimality": self.optimality(samples),
            "arrived": [float(self.length(walk) is not None) for walk in samples],
        }

    def forbidden(self, vocab_size: int, eos_token_id: int) -> np.ndarray:
        """bool [vocab_size, vocab_size], True where token column must **not** follow token row.

        Token ids of letters are node numbers (see tokenizer.py). After the goal only eos may come; after a token
        that is no letter, any letter.
        """
        num_nodes = len(self.letters)
        allowed = np.zeros((vocab_size, vocab_size), dtype=bool)
        allowed[:, :num_nodes] = True
        allowed[:num_nodes, :num_nodes] = self.edges
        allowed[GOAL, eos_token_id] = True
        return ~allowed

    def _optimality(self, walk: str) -> float:
        length = self.length(walk)
        if length is None or length >= self.max_length:
            return 0.0
        return (self.max_length - length) / (self.max_length - self.shortest[walk[0]])

    def _random_walk(self, rng: np.random.RandomState) -> str:
        nodes = [_draw_start(rng, len(self.letters))]
        while nodes[-1] != GOAL and len(nodes) < self.max_length:
            nodes.append(rng.choice(np.flatnonzero(self.edges[nodes[-1]])))
        return "".join(self.letters[node] for node in nodes)


def _random_edges(rng: np.random.RandomState, num_nodes: int, p_edge: float) -> np.ndarray:
    """Each edge with probability `p_edge`, drawn anew until every node has a way out."""
    while True:
        edges = rng.rand(num_nodes, num_nodes) > 1 - p_edge
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all():
            edges[GOAL] = False
            return edges


def _draw_start(rng: np.random.RandomState, num_nodes: int) -> int:
    while True:
        node = rng.randint(num_nodes)
        if node != GOAL:
            return node
