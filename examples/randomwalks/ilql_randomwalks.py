"""ILQL on random walks: from a random model and walks of all qualities to shortest ones.

Usage: python -m examples.randomwalks.ilql_randomwalks [--seed N] [--out FOLDER] [method.tau=0.7 ...]
       torchrun --nproc-per-node 4 -m examples.randomwalks.ilql_randomwalks --backend megatron --tp 2 --pp 2

Evaluations sample at beta 0 (imitation of the walks), 1 and 100 (the step of highest Q).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import trlx
from examples.megatron import add_backend, backend
from trlx.launch.demo.training import learn_offline


def main(hparams: Mapping[str, Any] | None = None, preset: str = "randomwalks-ilql", overrides: Sequence[str] = ()):
    """One run. `overrides` are texts such as "method.tau=0.7"; `hparams`, dotted or nested, come after them."""
    return learn_offline(trlx.load_preset(preset, overrides=overrides), hparams)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="randomwalks-ilql", help="randomwalks-ilql, or a YAML file")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", default="ckpts/randomwalks/ilql", help="folder of checkpoints, metrics and samples")
    add_backend(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting of the config")
    args = parser.parse_intermixed_args()
    given = {"train.seed": args.seed, "train.checkpoint_dir": args.out, **backend(args, "ILQL")}
    main(given, args.preset, args.overrides)
