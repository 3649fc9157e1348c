"""Helpful and harmless answers (arXiv:2204.05862): data, reward and model sizes that PPO, ILQL and SFT share."""

from __future__ import annotations

import os
from functools import cache
from itertools import islice
from typing import Any

import trlx
from examples.common import RewardFn, Rows, hub_data, reward, rows, share_of_vowels
from examples.published_rewards import load_gptj_reward

STOP = ["Human:", "human:", "Assistant:", "assistant:"]
"""The answer ends where the model begins to play the other side."""
GPTJ = "EleutherAI/gpt-j-6B"
PUBLISHED = {"checkpoint": "Dahoas/gptj-rm-static", "revision": "676bfd4d", "end": "<|endoftext|>"}
"""A reward model for it, which judges at the eos token."""


def with_size(config: trlx.TRLConfig, sizes: dict[str, dict[str, Any]]) -> trlx.TRLConfig:
    """`config` with the changes for the size that the environment's CONFIG_NAME chooses: 125M, 1B, 6B or 20B."""
    name = os.environ.get("CONFIG_NAME")
    if name is None:
        return config
    folder = f"{config.train.checkpoint_dir}_{name}"
    return config.evolve(
        tokenizer={"tokenizer_path": "EleutherAI/gpt-neox-20b"}, train={"checkpoint_dir": folder}
    ).evolve(**sizes[name])


def comparisons(data: str, split: str, name: str) -> Rows:
    """Rows of ``prompt``, the ``chosen`` answer and the ``rejected`` one."""
    return rows(data, lambda: hub_data(name, split=split), _made)


def with_chosen(comparisons: Rows, limit: int | None = None) -> Rows:
    """Prompts with the human's choice beside them, for the reward to compare with."""
    return [{"prompt": row["prompt"], "original_output": row["chosen"]} for row in islice(comparisons, limit)]


def helpfulness(source: str) -> RewardFn:
    """How much better than the human's choice a reward model finds each answer.

    The default model is Dahoas/gptj-rm-static, on the last GPU; with REWARD_URL in the environment a server that runs
    serve_reward.py.
    """
    url = os.environ.get("REWARD_URL")
    judge = reward(source, lambda: trlx.RemoteReward(url) if url else _gptj_judge(), share_of_vowels)

    def delta(samples, prompts, outputs, original_output, **kwargs):
        theirs = {"samples": [p + o for p, o in zip(prompts, original_output, strict=True)], "outputs": original_output}
        ours = judge(samples=samples, prompts=prompts, outputs=outputs, **kwargs)
        human = judge(prompts=prompts, **theirs)
        return [float(a) - float(b) for a, b in zip(ours, human, strict=True)]

    return delta


def _gptj_judge() -> RewardFn:
    @cache
    def model():  # loaded at the first call, so only by processes that score
        return load_gptj_reward(GPTJ, **PUBLISHED)

    return lambda **given: model()(**given)


def _made() -> Rows:
    asked = "\n\nHuman: What is {} and {}?\n\nAssistant:"
    return [{"prompt": asked.format(i, i), "chosen": f" It is {2 * i}.", "rejected": " No idea."} for i in range(8)]
