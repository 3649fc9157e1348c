"""ILQL towards prompts for images that people like, from rated prompts (github.com/JD-P/simulacra-aesthetic-captions).

Usage: python -m examples.simulacra [--model tiny] [--data made] [section.key=value ...]
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.request import urlretrieve

import trlx
from examples.common import Rows, arguments, configure, rows

DATABASE = Path("sac_public_2022_06_29.sqlite")
URL = f"https://raw.githubusercontent.com/JD-P/simulacra-aesthetic-captions/main/{DATABASE.name}"
QUERY = """
    SELECT generations.prompt, ratings.rating
    FROM ratings
    JOIN images ON ratings.iid = images.id
    JOIN generations ON images.gid = generations.id
    WHERE ratings.rating IS NOT NULL
"""


def ratings() -> Iterator[dict]:
    """Rows of ``prompt`` and ``rating`` (1 to 10), downloaded once."""
    fetch(URL, DATABASE)
    with closing(sqlite3.connect(DATABASE)) as connection:
        for prompt, rating in connection.execute(QUERY):
            yield {"prompt": prompt, "rating": rating}


def fetch(url: str, path: Path) -> None:
    """Downloads a file that is not there yet: one process of a machine does, the others wait."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and not path.exists():
        partial = path.with_suffix(".part")
        urlretrieve(url, partial)
        partial.rename(path)
    while not path.exists():
        time.sleep(1)


def made() -> Rows:
    """Longer prompts, better ratings."""
    return [{"prompt": "a castle" + ", painted in oil" * length, "rating": 4 + length} for length in range(4)] * 4


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer. `reward` is not used: ratings are."""
    config = configure(trlx.load_preset("ilql"), hparams)
    rated = rows(data, ratings, made)
    return trlx.train(
        samples=[row["prompt"] for row in rated],
        rewards=[row["rating"] for row in rated],
        eval_prompts=["An astronaut riding a horse"] * (64 if data == "default" else 4),
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
