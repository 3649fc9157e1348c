"""What the examples share: a model, data and reward that the command line can replace, and small ones made in code.

Every example has ``main(hparams, data, reward)`` and, on the command line,

    --model NAME     hub name or folder; "tiny": a small random model with a tokenizer of bytes, for trying things out;
                     with it data and reward are made ones and a run has four steps, unless something else is said
    --tokenizer NAME where it is not beside the model
    --data SOURCE    "default": from the hub; "made": a few rows made in code; else a file of JSON lines
    --reward SOURCE  "default": as the example says; "made": a formula; else "module:function" of your own
    --out FOLDER     checkpoints, metrics and samples
    section.key=value ...  any setting
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, PretrainedConfig, PreTrainedTokenizerFast, T5Config

from trlx import TRLConfig
from trlx.optional import require

Rows = list[dict[str, Any]]
RewardFn = Callable[..., Sequence[Any]]

QUICK = {"train.total_steps": 4, "train.eval_interval": 4, "train.tracker": None}
"""Settings with which the tiny model is trained offline, in seconds, where the command line does not say others."""


def arguments(doc: str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What ``main`` takes, read from the command line; `doc` is the help text."""
    return chosen(example_parser(doc).parse_intermixed_args(argv))


def example_parser(doc: str) -> argparse.ArgumentParser:
    """Reads the command line of an example; one that takes more adds it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='hub name or folder, or "tiny" for a small random one')
    parser.add_argument("--tokenizer", help="hub name or folder (default: the model's)")
    parser.add_argument("--data", help='"made", or a file of JSON lines')
    parser.add_argument("--reward", help='"made", or module:function')
    parser.add_argument("--out", help="folder of checkpoints, metrics and samples")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting")
    return parser


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """``hparams``, ``data`` and ``reward`` of a command line."""
    named = {"model.model_path": args.model, "train.checkpoint_dir": args.out}
    hparams = {key: value for key, value in named.items() if value is not None}
    if args.model or args.tokenizer:  # another model has another tokenizer than the example names
        hparams["tokenizer.tokenizer_path"] = args.tokenizer
    usual, quick = ("made", QUICK) if args.model == "tiny" else ("default", {})
    hparams = quick | hparams | _settings(args.overrides)
    return {"hparams": hparams, "data": args.data or usual, "reward": args.reward or usual}


def configure(base: TRLConfig, hparams: Mapping[str, Any] | None) -> TRLConfig:
    """`base` with `hparams` over it; the model "tiny" becomes one that fits the rest of the config."""
    config = TRLConfig.update(base, hparams or {})
    if config.model.model_path != "tiny":
        return config
    seq2seq = config.model.model_arch_type == "seq2seq"
    tokenizer = byte_tokenizer(ends_texts=seq2seq)
    return config.evolve(
        model={
            "model_path": tiny_t5(tokenizer) if seq2seq else tiny_gpt2(tokenizer),
            "num_layers_unfrozen": min(config.model.num_layers_unfrozen, 1),
        },
        tokenizer={"tokenizer_path": tokenizer},
    )


def rows(source: str, hub: Callable[[], Iterable[Mapping[str, Any]]], made: Callable[[], Rows]) -> Rows:
    """The data that ``--data`` names."""
    if source == "default":
        return [dict(row) for row in hub()]
    if source == "made":
        return made()
    return [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]


def hub_data(name: str, subset: str | None = None, **how: Any) -> Iterable[Mapping[str, Any]]:
    """A data set of the Hugging Face hub; `how` as in ``datasets.load_dataset``."""
    require("datasets", extra="data", purpose=f"Loading {name} from the hub")
    from datasets import load_dataset

    return load_dataset(name, subset, **how)


def reward(source: str, default: Callable[[], RewardFn], made: RewardFn) -> RewardFn:
    """The function that ``--reward`` names."""
    if source == "default":
        return default()
    if source == "made":
        return made
    module, _, function = source.partition(":")
    return getattr(importlib.import_module(module), function)


def share_of_vowels(samples: Sequence[str], **kwargs: Any) -> list[float]:
    """A made reward in [0, 1]."""
    return [sum(sample.count(vowel) for vowel in "aeiou") / max(len(sample), 1) for sample in samples]


def overlap(output: str, reference: str) -> float:
    """A made measure of likeness in [0, 1]: F1 of the words of both."""
    ours, theirs = output.split(), reference.split()
    common = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
    return 2 * common / max(len(ours) + len(theirs), 1)


def byte_tokenizer(ends_texts: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; <pad> 0, <s> 1, </s> 2. With `ends_texts` it adds </s>, as T5's does."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # byte-pair encoding without a single merge leaves bytes
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends_texts:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def tiny_gpt2(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """A decoder of 66,528 parameters."""
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 1024}
    return GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)


def tiny_t5(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """A small encoder-decoder."""
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, eos_token_id=2, pad_token_id=0, **shape)


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """``section.key=value`` as nested settings; or one JSON object, as sweeps pass them."""
    if len(overrides) == 1 and overrides[0].startswith("{"):
        return json.loads(overrides[0])
    return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
