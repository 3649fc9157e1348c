"""What is measured: sizes of models and batches, and the data that every contender gets."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PretrainedConfig, PreTrainedTokenizerFast

from benchmarks.speed.countdown import PERIOD, CountdownGPT2Config, CountdownLlamaConfig

EOS = 0
"""The id of eos, which is also the padding."""


@dataclass(frozen=True)
class Workload:
    """The default is GPT-2 small. One iteration trains on `rows` prompts or samples, in batches of `batch_size` (of
    pairs: answers). The first `warm_up` iterations are not measured.
    """

    task: str
    """ppo, sampling, grpo, rloo, sft, dpo or reward."""
    contenders: tuple[str, ...]
    """What trlx is compared with: names in `benchmarks.speed.run.CONTENDERS`."""
    rows: int = 16
    prompt_length: int = 32
    new_tokens: int = 48
    batch_size: int = 16
    ragged: bool = False
    """Lengths are drawn from a log-normal distribution; otherwise prompts have `prompt_length` tokens, and only an eos
    ends a response before `new_tokens`."""
    group: int = 1
    """Samples of each prompt, or the answers of a pair."""
    epochs: int = 1
    iterations: int = 1
    warm_up: int = 0
    unfrozen: int = -1
    """Blocks that train, from the top; -1: everything trains."""
    lr: float = 1e-5
    llama: bool = False
    """Llama's architecture in place of GPT-2's; for ragged workloads that sample."""
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocab: int = 50257

    @property
    def longest(self) -> int:
        """Tokens of the longest row that is possible."""
        return self.prompt_length + self.new_tokens

    @property
    def steps(self) -> int:
        """Optimizer steps of one iteration."""
        return self.epochs * -(-self.rows * self.group // self.batch_size)


# the first collection of a run is not like the others: trlx compares the sampler with the policy there
PPO = Workload("ppo", ("plain",), epochs=4, warm_up=1)
WORKLOADS = {
    # the model and the sizes of examples/randomwalks
    "randomwalks": replace(
        PPO, layers=6, width=144, vocab=24, rows=128, prompt_length=1, new_tokens=9, batch_size=100, iterations=20,
        lr=3e-4,
    ),
    "gpt2-small": PPO,
    "gpt2-small-2-blocks": replace(PPO, unfrozen=2),
    "gpt2-small-ragged": replace(PPO, ragged=True),
    "gpt2-small-ragged-2-blocks": replace(PPO, ragged=True, unfrozen=2),
    "llama-160m-ragged": replace(PPO, ragged=True, llama=True, vocab=32000),
    "sampling": Workload("sampling", ("generate",), rows=64, ragged=True),
    "sft-ragged": Workload("sft", ("plain", "trl", "trl-packed"), 32, prompt_length=48, new_tokens=80, ragged=True),
    "grpo-ragged": Workload("grpo", ("trl",), rows=4, group=8, ragged=True, warm_up=1),
    "rloo-ragged": Workload("rloo", ("trl",), rows=4, group=8, ragged=True, warm_up=1),
    "dpo-ragged": Workload("dpo", ("trl",), rows=8, group=2, batch_size=8, ragged=True),
    "reward-ragged": Workload("reward", ("trl",), rows=16, group=2, batch_size=8, ragged=True),
}  # fmt: skip


def tiny(load: Workload) -> Workload:
    """The same work in a second."""
    sizes = {"layers": 2, "width": 16, "heads": 2, "vocab": 2 * PERIOD, "prompt_length": 6, "new_tokens": 8}
    counts = {"rows": min(load.rows, 4), "group": min(load.group, 2), "batch_size": 4, "iterations": 1}
    return replace(load, **sizes, **counts, epochs=1, unfrozen=min(load.unfrozen, 1))


def model_config(load: Workload) -> PretrainedConfig:
    """The model; if responses are ragged, it ends them itself at the lengths that the prompts ask for."""
    special = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
    if load.llama:
        return CountdownLlamaConfig(
            num_hidden_layers=load.layers,
            hidden_size=load.width,
            num_attention_heads=load.heads,
            intermediate_size=4 * load.width,
            vocab_size=load.vocab,
            **special,
        )
    generates = load.task in ("ppo", "sampling", "grpo", "rloo")
    return (CountdownGPT2Config if load.ragged and generates else GPT2Config)(
        n_layer=load.layers,
        n_embd=load.width,
        n_head=load.heads,
        vocab_size=load.vocab,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        **special,
    )


def number_tokenizer(load: Workload) -> PreTrainedTokenizerFast:
    """Token i is the word i: "12 7 <eos>" is [12, 7, 0]. So texts and ids are the same in every contender."""
    eos = "<eos>"
    words = [eos, *map(str, range(1, load.vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=eos))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        eos_token=eos,
        pad_token=eos,
    )


def text_of(ids: list[int]) -> str:
    """The text that `number_tokenizer` reads as `ids`."""
    return " ".join(map(str, ids))


def _lengths(draws: random.Random, count: int, longest: int, ragged: bool) -> list[int]:
    """Log-normal with half of the longest as median, at least 1."""
    if not ragged:
        return [longest] * count
    return [min(max(round(longest / 2 * draws.lognormvariate(0, 0.6)), 1), longest) for _ in range(count)]


def _ids(draws: random.Random, load: Workload, count: int) -> list[int]:
    return [draws.randrange(1, load.vocab) for _ in range(count)]


def prompts(load: Workload) -> list[list[int]]:
    """Ids of the prompts. The last one of each asks for the length of the response, see `Countdown`."""
    draws = random.Random(0)
    found = [_ids(draws, load, length) for length in _lengths(draws, load.rows, load.prompt_length, load.ragged)]
    if load.ragged:
        for ids, length in zip(found, _lengths(draws, load.rows, load.new_tokens, True), strict=True):
            ids[-1] = draws.randrange(load.vocab // PERIOD) * PERIOD + length
    return found


def answers(load: Workload, seed: int = 1) -> list[list[int]]:
    """Ids of given responses to `prompts`, without an eos; for each seed others."""
    draws = random.Random(seed)
    return [_ids(draws, load, length) for length in _lengths(draws, load.rows, load.new_tokens - 1, load.ragged)]


class Reward:
    """The reward of every contender: the share of even numbers in a text. `lengths` are those of the responses so far,
    eos included."""

    def __init__(self):
        self.lengths: list[int] = []

    def __call__(self, texts: list[str]) -> list[float]:
        numbers = [[int(word) for word in text.split()] for text in texts]
        self.lengths += [len(row) + 1 for row in numbers]
        return [sum(number % 2 == 0 for number in row) / max(len(row), 1) for row in numbers]
