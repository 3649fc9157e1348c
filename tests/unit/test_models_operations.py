import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig

from trlx.models import operations
from trlx.models.policy import load_model

LARGE = GPT2Config(vocab_size=2500, n_embd=16, n_layer=1, n_head=2, n_positions=16)
LLAMA = LlamaConfig(vocab_size=2500, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def gradients(head, hidden):
    """Logits of `hidden`, and the gradients of the sum of their squares."""
    hidden = hidden.clone().requires_grad_()
    logits = head(hidden)
    found = torch.autograd.grad(logits.square().sum(), [hidden, *head.parameters()])
    return [logits.detach(), *found]


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16), (16,), (0, 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_an_output_head_in_slices_is_the_output_head(monkeypatch, shape, bias):
    model = load_model(LLAMA, {})
    plain = nn.Linear(16, 2500, bias)
    model.set_output_embeddings(copy.deepcopy(plain))
    sliced = operations.with_fast_operations(model).get_output_embeddings()
    applied = []
    monkeypatch.setattr(operations.F, "linear", lambda *args, own=operations.F.linear: applied.append(1) or own(*args))
    hidden = torch.randn(shape)
    found = gradients(sliced, hidden)
    assert len(applied) == 3  # 1024, 1024 and 452 tokens
    for mine, theirs in zip(found, gradients(plain, hidden), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_sliced_keeps_hooks_names_and_copies_of_its_own():
    model = load_model(LARGE, {})
    head, seen = model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.add_(1.0)
        logits = model(torch.tensor([[3, 4]])).logits
        assert seen == [logits.shape] and not torch.equal(logits, twin(torch.tensor([[3, 4]])).logits)
    assert "lm_head.weight" in model.state_dict()


def test_a_head_in_another_precision_runs_as_it_is(monkeypatch):
    model = load_model(LLAMA, {"dtype": "bfloat16"})
    monkeypatch.setattr(operations._Slices, "apply", None)
    assert model.lm_head(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert load_model(LLAMA, {}).lm_head(torch.randn(2, 16)).dtype == torch.bfloat16
