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

from trlx import TRLConfig
from trlx.launch.made import QUICK, with_tiny_model
from trlx.launch.made import byte_tokenizer as byte_tokenizer
from trlx.launch.made import share_of_vowels as share_of_vowels
from trlx.launch.made import tiny_gpt2 as tiny_gpt2
from trlx.optional import require

Rows = list[dict[str, Any]]
RewardFn = Callable[..., Sequence[Any]]


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
    return with_tiny_model(TRLConfig.update(base, hparams or {}))


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


def overlap(output: str, reference: str) -> float:
    """A made measure of likeness in [0, 1]: F1 of the words of both."""
    ours, theirs = output.split(), reference.split()
    common = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
    return 2 * common / max(len(ours) + len(theirs), 1)


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """``section.key=value`` as nested settings; or one JSON object, as sweeps pass them."""
    if len(overrides) == 1 and overrides[0].startswith("{"):
        return json.loads(overrides[0])
    return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
