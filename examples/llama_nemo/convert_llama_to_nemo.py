"""A Llama, or any model that the NeMo trainers know, as a `.nemo` archive for as many ranks as it is to run on.

Usage: python -m examples.llama_nemo.convert_llama_to_nemo FOLDER llama2-7b.nemo --tensor 4

The NeMo trainers read Hugging Face folders themselves, in any layout: an archive is for other tools that want one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trlx.launch.convert import convert


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with config.json and safetensors files")
    parser.add_argument("target", type=Path, help="the archive, a name that ends in .nemo")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor ranks")
    parser.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline ranks")
    args = parser.parse_args(argv)
    convert(args.source, args.target, tensor=args.tensor, pipeline=args.pipeline)


if __name__ == "__main__":
    main()
