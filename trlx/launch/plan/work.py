"""Tokens, floating-point operations and time of an optimizer step, with the sampling and scoring that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from trlx.config import TRLConfig
from trlx.registry import trainers
from trlx.strict import ConfigError, suggestion
from trlx.trainer import accelerate, nemo  # noqa: F401, they register the trainers

EFFICIENCY = 0.4
"""The share of a GPU's peak that a plan counts on, of its operations as of its memory's speed."""


@dataclass(frozen=True)
class Gpu:
    """What a vendor says of a GPU, for dense matrices: data sheets also show twice as much, with sparsity."""

    name: str
    half: float
    """TFLOPS in bf16, summed in float32."""
    single: float
    """TFLOPS in float32, without tensor cores."""
    speed: float
    """GB/s of its memory."""
    memory: float
    """GiB, as nvidia-smi shows it."""


# NVIDIA's data sheets "A100 80GB" (SXM), "H100" (SXM), "H200" (SXM) and "L40S", and its whitepaper "NVIDIA Ada GPU
# Architecture" for the RTX 4090, whose tensor cores are half as fast where they sum in float32. As they are quoted by
# glennklockwood.com/garden/processors/{A100,h100}, mullet.se (product 355414) and waredb.com
GPUS = {
    "a100": Gpu("A100 80GB", 312, 19.5, 2039, 80),
    "h100": Gpu("H100 SXM", 989, 67, 3350, 80),
    "h200": Gpu("H200", 989, 67, 4800, 140),
    "l40s": Gpu("L40S", 362, 91.6, 864, 45),
    "rtx4090": Gpu("RTX 4090", 165, 82.6, 1008, 24),
}


def gpu_named(name: str) -> Gpu:
    """A GPU of `GPUS`.

    Raises:
        ConfigError: it is not one of them.
    """
    if name not in GPUS:
        raise ConfigError(f"Unknown GPU {name!r}.{suggestion(name, GPUS)} Known: {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an optimizer step computes, over all processes. Numbers of weights are of the whole model."""

    rows: int
    """Rows that are trained on."""
    sampled: float
    """Responses that are sampled for them: fewer than `rows` where a collection is trained on several times."""
    scored: float
    """Rows that are read without gradients, once for each time."""
    kept: float
    """Of `scored`, those whose frozen blocks do not run."""
    length: int
    """Tokens of a row."""
    response: int
    """Those of them that get a log-probability."""
    new: int
    """Those of them that are sampled."""
    trained: int
    """Weights in blocks that train."""
    frozen: int
    """Weights in blocks that do not."""
    output: int
    """Weights of the output head."""
    heads: int = 0
    """Weights of value and Q heads."""
    passes_frozen: int = 2
    """Operations for each frozen weight and token of an update: 2, 0 where hidden states are kept, and 4 where
    gradients go through frozen weights to an adapter."""
    again: int = 0
    """Operations more for each weight that trains, where its block is computed again: 2."""
    half: bool = True
    gpus: int = 1
    bubble: float = 0.0
    """The share of time in which pipeline stages wait for each other, see `traffic.bubble`."""
    draws: float = 0.0
    """Tokens that each process draws one after the other, for several rows at once."""
    read: float = 0.0
    """Bytes that a process reads to draw one token for each row: weights, and keys and values half full."""

    @property
    def tokens(self) -> dict[str, float]:
        """By phase."""
        return {
            "sampling": self.sampled * self.length,
            "scoring": self.scored * self.length,
            "update": self.rows * self.length,
        }

    @property
    def flops(self) -> dict[str, float]:
        """By phase: 2 operations for each weight and token forward, 6 forward and backward (arXiv:2001.08361, 2.1).

        The products of attention scores are left out; they count where rows are longer than 6 times the width.
        """
        blocks = self.trained + self.frozen
        return {
            "sampling": 2 * self.sampled * (blocks * self.length + self.output * self.new),
            "scoring": 2 * self.scored * (blocks * self.length + (self.output + self.heads) * self.response)
            - 2 * self.kept * self.frozen * self.length,
            "update": self.rows
            * (
                self.length * ((6 + self.again) * self.trained + self.passes_frozen * self.frozen)
                + 6 * self.response * (self.output + self.heads)
            ),
        }

    def seconds(self, gpu: Gpu, efficiency: float) -> dict[str, float]:
        """By phase. Drawing tokens waits for the memory or for operations; messages between processes are left out."""
        peak = (gpu.half if self.half else gpu.single) * 1e12 * efficiency
        found = {name: flops / self.gpus / peak for name, flops in self.flops.items()}
        for name in ("scoring", "update"):
            found[name] /= 1 - self.bubble
        found["sampling"] = max(found["sampling"], self.draws * self.read / (gpu.speed * 1e9 * efficiency))
        return found


def rows_of_a_step(config: TRLConfig, rows: int, reference: bool, exact: bool) -> dict[str, float]:
    """`rows`, `sampled` and `scored` of `Work` for a step of `rows` rows.

    Args:
        reference: rows are also read by the reference.
        exact: the sampler's own log-probabilities are taken, so the policy reads no row again.
    """
    method, is_online = config.method, trainers.get(config.train.trainer).online
    if not is_online:  # the reference reads each row once, before the first step
        return {"rows": rows, "sampled": 0, "scored": rows * reference / config.train.epochs}
    if hasattr(method, "n_improve_steps"):  # RFT trains on what is above a rising quantile, several times
        chosen = 1 - (method.start_percentile + method.end_percentile) / 2
        return {"rows": rows, "sampled": rows / max(chosen * method.n_improve_steps, 1e-3), "scored": 0}
    drawn = rows / getattr(method, "ppo_epochs", getattr(method, "num_iterations", 1))
    return {"rows": rows, "sampled": drawn, "scored": drawn * (reference + (not exact))}
