from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, MptForCausalLM

from tests.unit.tiny_models import tiny_config, tiny_model
from trlx.models.decoder import output_head, trunk
from trlx.models.logprobs import Chosen, chosen_logprobs, logits_of


class CountingHead(nn.Linear):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(4, 6)
        self.rows: list[int] = []

    def forward(self, hidden):
        self.rows.append(len(hidden))
        return super().forward(hidden)


def test_logprobs_are_those_of_the_temperature_scaled_softmax():
    logits = torch.tensor([[0.0, 0.0], [math.log(9.0), 0.0]], requires_grad=True)
    found = chosen_logprobs(logits, torch.tensor([1, 0]), lambda hidden: hidden, temperature=0.5)
    # At temperature 1/2 the odds 9 : 1 become 81 : 1.
    torch.testing.assert_close(found, torch.tensor([1 / 2, 81 / 82]).log())
    (found * torch.tensor([1.0, 41.0])).sum().backward()
    # 1 - p of the chosen one, -p of the other, / temperature
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[200.0, 0.0], [0.0, -200.0]])
    assert Chosen.apply(logits, torch.tensor([1, 0]))[1].tolist() == [-200.0, 0.0]


def test_probabilities_and_gradient_take_the_memory_of_the_logits():
    held = []

    def head(hidden):
        logits = hidden @ torch.ones(4, 6)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: held.append(gradient.data_ptr()))
        held.append(logits.data_ptr())
        return logits

    chosen_logprobs(torch.ones(2, 4, requires_grad=True), torch.tensor([0, 1]), head).sum().backward()
    assert held[-1] == held[-2]


def test_chunks_bound_the_logits_held_and_change_neither_values_nor_gradients():
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 5, 2, 2, 1])
    results = []
    for chunk_elements in (10**6, 12):
        head, states = CountingHead(), hidden.clone().requires_grad_()
        found = chosen_logprobs(states, targets, head, 0.7, chunk_elements)
        (found * torch.arange(5)).sum().backward()
        results.append((found, states.grad, head.weight.grad, head.bias.grad, [n for n in head.rows if n]))
    for whole, pieces in zip(results[0][:4], results[1][:4], strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-5, atol=1e-6)
    assert results[0][4] == [5]
    # Two rows of six logits fit; every piece is computed again in the backward pass.
    assert results[1][4][:3] == [2, 2, 1] and sorted(results[1][4][3:]) == [1, 2, 2]


def test_without_gradient_no_chunk_is_computed_twice():
    head = CountingHead()
    with torch.no_grad():
        chosen_logprobs(torch.ones(5, 4), torch.zeros(5, dtype=torch.long), head, chunk_elements=12)
    assert [n for n in head.rows if n] == [2, 2, 1]


def test_half_precision_states_give_float32_logprobs():
    head = nn.Linear(4, 6, dtype=torch.bfloat16)
    assert chosen_logprobs(torch.ones(2, 4, dtype=torch.bfloat16), torch.tensor([0, 1]), head).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "scale", "cap"),
    [("gpt2", 1.0, None), ("cohere", 0.0625, None), ("granite", 0.125, None), ("gemma2", 1.0, 2.0)],
)
def test_the_scale_and_soft_cap_after_the_head_come_from_the_config(name, scale, cap):
    logits = logits_of(tiny_model(name))
    assert (logits.scale, logits.cap) == (scale, cap)


def test_a_declared_scale_that_the_model_does_not_apply_is_not_applied():
    assert logits_of(MptForCausalLM(tiny_config("mpt", logit_scale=0.5)).eval()).scale == 1.0


def test_a_model_that_changes_its_logits_in_another_way_is_refused():
    class Doubling(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    with pytest.raises(ValueError, match="Doubling is not supported"):
        logits_of(Doubling(tiny_config()))


def test_a_model_that_looks_ahead_is_refused():
    model = tiny_model()

    def look_ahead(module, args, output):
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    trunk(model).register_forward_hook(look_ahead)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported"):
        logits_of(model)


def test_not_a_number_in_the_weights_does_not_pass_the_check():
    model = tiny_model("llama")
    nn.init.constant_(output_head(model).weight, float("nan"))
    with pytest.raises(ValueError, match="LlamaForCausalLM is not supported"):
        logits_of(model)


def test_the_check_draws_no_random_number():
    model = tiny_model(resid_pdrop=0.5).train()
    before = torch.get_rng_state()
    logits_of(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
