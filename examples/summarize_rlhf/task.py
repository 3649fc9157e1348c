"""Summaries of Reddit posts (arXiv:2009.01325): data and reward that all steps share."""

from __future__ import annotations

from functools import cache
from itertools import islice

from examples.common import RewardFn, Rows, hub_data, overlap, reward, rows, share_of_vowels
from examples.published_rewards import load_gptj_reward
from trlx.data.tokenizer import prompt_tokens

SFT = "CarperAI/openai_summarize_tldr_sft"
REWARD = "CarperAI/openai_summarize_tldr_rm_checkpoint"
CUE = "TL;DR:"
"""What a prompt ends with."""
MAX_LENGTH = 550


def posts(data: str, split: str, limit: int | None = None) -> Rows:
    """Rows of ``prompt``, a post that ends with the cue, and ``label``, a human's summary."""
    found = rows(data, lambda: islice(hub_data("CarperAI/openai_summarize_tldr", split=split), limit), _made_posts)
    return [{"prompt": row["prompt"], "label": row["label"]} for row in found]


def with_label(posts: Rows, tokenizer, max_tokens: int) -> Rows:
    """Prompts with the human's summary beside them; posts are cut so that the cue stays."""
    cue = f"\n{CUE}"
    room = max_tokens - len(prompt_tokens([cue], tokenizer)[0])  # the cue, and what stands in front of every prompt
    texts = [row["prompt"].partition(CUE)[0].rstrip() for row in posts]
    kept = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    prompts = [tokenizer.decode(ids[:room], skip_special_tokens=True) + cue for ids in kept]
    return [{"prompt": prompt, "label": row["label"]} for prompt, row in zip(prompts, posts, strict=True)]


def comparisons(data: str, split: str) -> Rows:
    """Rows of ``prompt`` and two summaries, ``chosen`` and ``rejected``."""
    name = "CarperAI/openai_summarize_comparisons"
    return rows(data, lambda: hub_data(name, split=split), _made_comparisons)


def preference(source: str) -> RewardFn:
    """What a reward model trained on comparisons says of a post with its summary."""
    return reward(source, _published, share_of_vowels)


def better_than_human(judge: RewardFn) -> RewardFn:
    """The difference `judge` makes between a summary and the human's of the same post."""

    def reward_fn(samples, prompts, outputs, label, **kwargs):
        human = [prompt + summary for prompt, summary in zip(prompts, label, strict=True)]
        ours = judge(samples=samples, **kwargs)
        return [a - b for a, b in zip(ours, judge(samples=human), strict=True)]

    return reward_fn


def rouge(source: str):
    """ROUGE of summaries against labels, as metric_fn; common words where `source` is "made"."""
    if source == "made":
        return lambda outputs, label, **kwargs: {"overlap": list(map(overlap, outputs, label))}
    import evaluate

    metric = evaluate.load("rouge")
    return lambda outputs, label, **kwargs: {
        name: float(value) for name, value in metric.compute(predictions=outputs, references=label).items()
    }


def _published() -> RewardFn:
    @cache
    def model():  # loaded at the first call, so only by processes that score
        return load_gptj_reward(SFT, REWARD, begin="<|startoftext|>")

    return lambda **given: model()(**given)


def _made_posts() -> Rows:
    return [{"prompt": f"TITLE: Cats\nPOST: I have {i} cats.\n{CUE}", "label": f" {i} cats."} for i in range(8)]


def _made_comparisons() -> Rows:
    return [{"prompt": row["prompt"], "chosen": row["label"], "rejected": " Dogs are fine."} for row in _made_posts()]
