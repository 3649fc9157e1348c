from __future__ import annotations

import math

import pytest
import torch

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
