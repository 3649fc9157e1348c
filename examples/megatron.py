"""What examples on tensor and pipeline parallelism share: the layout on the command line, and NeMo's presets.

    --tp N           processes that share every layer
    --pp N           stages that share the layers out
    --sp             tensor ranks share norms and dropout out, too
    --preset NAME    megatron_1.3b, megatron_2b, megatron_20b, megatron_65b, or a YAML file (scripts named nemo_...)

A copy of the model takes tp x pp processes; more of them, started with torchrun, see different data.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import trlx
from examples.common import RewardFn, chosen, configure, example_parser
from trlx.data.tokenizer import prompt_tokens

BACKENDS = ("accelerate", "megatron")
TRAINED = "ckpts/best_checkpoint"
"""What the inference examples take where no model is named."""


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Adds ``--tp``, ``--pp`` and ``--sp``."""
    parser.add_argument("--tp", type=int, metavar="N", help="processes that share every layer")
    parser.add_argument("--pp", type=int, metavar="N", help="pipeline stages")
    parser.add_argument("--sp", action="store_true", help="tensor ranks share norms and dropout out, too")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Adds ``--backend``, and the layout for the one that has one."""
    parser.add_argument("--backend", choices=BACKENDS, default="accelerate", help="what runs the model")
    add_layout(parser)


def layout(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that `add_layout`'s flags stand for; those not given are left to the config."""
    given = {
        "tensor_model_parallel_size": args.tp,
        "pipeline_model_parallel_size": args.pp,
        "sequence_parallel": args.sp or None,
    }
    return {f"train.trainer_kwargs.{name}": value for name, value in given.items() if value is not None}


def backend(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """The settings that `add_backend`'s flags stand for.

    Args:
        method: "PPO", "ILQL" or "SFT".

    Raises:
        ValueError: a layout, but for the backend that has none.
    """
    divided = layout(args)
    if args.backend == "megatron":
        return {"train.trainer": f"NeMo{method}Trainer", **divided}
    if divided:
        raise ValueError("--tp, --pp and --sp divide a model on the Megatron backend: add --backend megatron")
    return {}


def nemo_arguments(doc: str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What ``main`` of a nemo example takes, read from the command line: that of every example, preset and layout."""
    parser = example_parser(doc)
    parser.add_argument("--preset", default="megatron_1.3b", help="model and layout (default: megatron_1.3b)")
    add_layout(parser)
    args = parser.parse_intermixed_args(argv)
    return {**_with_layout(args), "preset": args.preset}


def layout_arguments(doc: str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The same for an example whose model knows its sizes, so that there is no preset."""
    parser = example_parser(doc)
    add_layout(parser)
    return _with_layout(parser.parse_intermixed_args(argv))


def nemo_config(method: str, preset: str, hparams: Mapping[str, Any] | None) -> trlx.TRLConfig:
    """The preset of a method ("ppo", "ilql" or "sft") with that of a model over it, and `hparams` over both.

    The pretrained model is ``model.model_path``, by default the folder ``ckpts/<preset>``. "tiny" is a small random one
    in place of the preset's, whose number of GPUs then does not count either.
    """
    folder = f"ckpts/{preset}"
    base = trlx.load_preset(method, preset).evolve(model={"model_path": folder}, tokenizer={"truncation_side": "right"})
    hparams = hparams or {}
    small = base.evolve(train={"minibatch_size": None, "trainer_kwargs": {"megatron_cfg": None}})
    if trlx.TRLConfig.update(small, hparams).model.model_path == "tiny":
        return configure(small, hparams)
    config = trlx.TRLConfig.update(base, hparams)
    pretrained = config.train.trainer_kwargs.get("pretrained_model") or config.model.model_path
    return config.evolve(train={"trainer_kwargs": {"pretrained_model": pretrained}})


def inference_config(method: str, hparams: Mapping[str, Any] | None) -> trlx.TRLConfig:
    """A config that holds ``model.model_path`` and trains nothing but heads, so that nearly all memory is for weights.

    The model is a folder that ``save_pretrained`` wrote, a checkpoint with such a folder in it, a ``.nemo`` archive, a
    name on the hub, or "tiny".
    """
    base = trlx.load_preset(method).evolve(model={"model_path": TRAINED, "num_layers_unfrozen": 0})
    return configure(base, hparams)


def speak(trainer: Any, prompts: Sequence[str], judge: RewardFn, **gen_kwargs: Any) -> list[str]:
    """Each prompt with a sample of what follows; printed once with what `judge` thinks. Called on every process."""
    ids = prompt_tokens(list(prompts), trainer.tokenizer)
    texts = trainer.tokenizer.batch_decode(trainer.generate(ids, **gen_kwargs), skip_special_tokens=True)
    if trainer.backend.is_main:
        print(*(f"{score:7.3f}  {text!r}" for score, text in zip(judge(samples=texts), texts, strict=True)), sep="\n")
    return texts


def _with_layout(args: argparse.Namespace) -> dict[str, Any]:
    given = chosen(args)
    return {**given, "hparams": {**layout(args), **given["hparams"]}}
