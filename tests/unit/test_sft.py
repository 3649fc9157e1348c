from __future__ import annotations

import math

import pytest
import torch

import trlx
from tests.builders import VOCABULARY, tiny_gpt2
from tests.runs import TEXTS, metrics, share_of_a, tiny_config
from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import finish, pack
from trlx.methods.sft import sft_loss


def test_the_loss_is_the_summed_cross_entropy_of_response_tokens():
    mask = torch.tensor([[False, True, True], [False, True, False]])
    batch = TokenBatch(torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(mask), mask, torch.zeros(2, 3))
    logprobs = torch.tensor([[-9.0, -1.0, -2.0], [-9.0, -4.0, math.nan]], requires_grad=True)
    loss, metrics = sft_loss(TokenOutputs(logprobs), batch)
    loss.backward()
    assert loss.item() == pytest.approx(7)
    assert finish(*pack(metrics)) == pytest.approx({"loss": 7 / 3})
    assert logprobs.grad.tolist() == [[0, -1, -1], [0, -1, 0]]


def test_held_out_samples_are_evaluated_and_not_trained_on(tmp_path):
    model = tiny_gpt2()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely as any other
    model.save_pretrained(tmp_path / "model")
    changes = {"model": {"model_path": str(tmp_path / "model")}, "train": {"total_steps": 4}}
    for name, held_out in (("with", {"eval_samples": ["abc", "de"]}), ("without", {})):
        trlx.train(config=tiny_config(tmp_path / name, "SFT", **changes), samples=TEXTS, **held_out)
    lines, alone = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    found = [line.pop("eval/loss") for line in lines if "eval/loss" in line]
    assert found[0] == pytest.approx(math.log(VOCABULARY), abs=1e-5) and found[1] < found[0]
    assert lines == alone
    with pytest.raises(ValueError, match="AcceleratePPOTrainer is not evaluated on samples: leave out eval_samples"):
        trlx.train(config=tiny_config(tmp_path, "PPO"), reward_fn=share_of_a, prompts=["a"], eval_samples=TEXTS)
