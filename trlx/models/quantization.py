"""Loads weights in 8 or 4 bits (bitsandbytes), with the arguments of earlier versions of ``from_pretrained``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from trlx.optional import require

SWITCHES = ("load_in_8bit", "load_in_4bit")
DETAILS = ("bnb_", "llm_int8_")
"""Prefixes of further settings, e.g. ``bnb_4bit_quant_type``."""


def quantized(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: ``load_in_8bit`` and ``load_in_4bit`` become a ``quantization_config``.

    Raises:
        ImportError: one of them is true and bitsandbytes is not installed.
    """
    own = {name: value for name, value in options.items() if name in SWITCHES or name.startswith(DETAILS)}
    others = {name: value for name, value in options.items() if name not in own}
    if not any(own.get(name) for name in SWITCHES):
        return others
    require("bitsandbytes", extra="bnb", purpose="Loading a model in 8 or 4 bits")
    # quantized weights cannot move, so they are loaded on the device of this process
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
    return {"device_map": {"": device}, **others, "quantization_config": BitsAndBytesConfig(**own)}
