"""Sampling with ``transformers``' own ``model.generate``, prompts padded on the left."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.speed.plain import left_padded
from benchmarks.speed.stopwatch import Stopwatch
from benchmarks.speed.workloads import EOS, Workload, model_config, prompts


def run(load: Workload) -> dict[str, Any]:
    """Samples one response for each prompt, and returns what was measured."""
    torch.manual_seed(0)
    model, watch = AutoModelForCausalLM.from_config(model_config(load)).eval(), Stopwatch()
    watch.reset()
    with watch.within("generate"), torch.no_grad():
        tokens, mask = left_padded(prompts(load))
        plain = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": load.new_tokens, "pad_token_id": EOS}
        sampled = model.generate(tokens, attention_mask=mask, **plain)
        rows = sampled[:, tokens.shape[1] :].tolist()
        lengths = [row.index(EOS) + 1 if EOS in row else len(row) for row in rows]
    return {**watch.result(), "lengths": sorted(lengths)}
