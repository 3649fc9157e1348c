"""PPO towards floor plans with few rooms: a toy of textual interior design (https://architext.design).

Usage: python -m examples.architext [--model tiny] [--data FILE] [--reward module:function] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure, rows
from examples.common import reward as chosen_reward

PAIRS = [
    ("the bedroom", "living room"),
    ("a bedroom", "living room"),
    ("the bedroom", "kitchen"),
    ("a bedroom", "kitchen"),
    ("the kitchen", "bathroom"),
    ("a bathroom", "living room"),
    ("the bathroom", "living room"),
]


def prompts():
    """Fourteen wishes, as rows."""
    wishes = [
        f"{room} {relation} to the {other}" for relation in ("is adjacent", "is not adjacent") for room, other in PAIRS
    ]
    return [{"prompt": f"[prompt] {wish} [layout]"} for wish in wishes]


def fewer_rooms(samples, **kwargs):
    """Minus the number of rooms: a layout writes a colon after each."""
    return [-sample.count(":") for sample in samples]


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(trlx.load_preset("ppo").evolve(model={"model_path": "architext/gptj-162M"}), hparams)
    return trlx.train(
        reward_fn=chosen_reward(reward, lambda: fewer_rooms, fewer_rooms),
        prompts=[row["prompt"] for row in rows(data, prompts, prompts)],
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
