"""Packed rows through torch's kernel for rows of different lengths: tests need no GPU, a plain function stands in."""

import pytest
import torch
from torch import nn

from tests.unit.test_models_policy import sharing_batch
from tests.unit.tiny_models import LAYERS, tiny_model
from trlx.models import packing
from trlx.models.architecture import COSTLY
from trlx.models.packing import why_unpackable
from trlx.models.policy import build_policy

has_kernel = pytest.mark.skipif(packing.varlen_attn is None, reason="torch before 2.13 has no such kernel")


def plain_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch's kernel for rows of different lengths returns, with a check of what it asks for."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] > key.shape[1])
    own, lengths = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (cu_seq_q[0], sum(own), cu_seq_k[0], sum(lengths)) == (0, len(query), 0, len(key))
    assert (max_q, max_k) == (max(own), max(lengths)) and {type(max_q), type(max_k)} == {int} and min(own) > 0
    found, groups = [], query.shape[1] // key.shape[1]
    for q, k, v in zip(query.split(own), key.split(lengths), value.split(lengths), strict=True):
        scores = scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(groups, dim=1))
        seen = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(groups, dim=1)))
    return torch.cat(found)


@pytest.mark.parametrize("shared", [3, 99])
@pytest.mark.parametrize("name", ["gpt2", "llama", "granite"])  # with grouped heads, with another scale
def test_rows_are_the_same_through_a_kernel_for_rows_of_different_lengths(name, shared, monkeypatch):
    monkeypatch.setattr(packing, "SHARED", shared)
    model, batch, calls, found = tiny_model(name), sharing_batch(), [], []
    rows = packing.packed(*batch[:2])
    assert len(rows.keys) - len(rows.at) == (10 if shared == 3 else 0)
    policy = build_policy(model, dropout=False)
    for where in (None, rows):
        policy.zero_grad()
        logprobs = policy(*batch, rows=where).logprobs
        logprobs.mean().backward()
        found.append([logprobs, *(weight.grad.clone() for weight in policy.parameters())])
        monkeypatch.setattr(packing, "kernel_for", lambda *_: lambda *a, **k: calls.append(a) or plain_kernel(*a, **k))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert len(calls) == LAYERS


def test_a_kernel_that_aligns_queries_with_the_first_keys_is_noticed(monkeypatch):
    def first_keys(query, key, value, cu_seq_q, cu_seq_k, *rest, **settings):
        own, lengths = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
        keys, values = (
            torch.cat([row[:count] for count, row in zip(own, states.split(lengths), strict=True)])
            for states in (key, value)
        )
        return plain_kernel(query, keys, values, cu_seq_q, cu_seq_q, max(own), max(own), **settings)

    architecture = build_policy(tiny_model("llama"), dropout=False).architecture
    for kernel, reason in ((plain_kernel, None), (first_keys, "has other hidden states in packed rows")):
        monkeypatch.setattr(packing, "kernel_for", lambda *_, kernel=kernel: kernel)
        for rounds in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
                assert why_unpackable(architecture) == reason


def test_a_kernel_gets_what_it_can_compute_in_the_precision_of_autocast(monkeypatch):
    asked, calls = [], []
    monkeypatch.setattr(packing, "kernel_for", lambda *about: asked.append(about) or kernel)
    rows = packing.packed(*sharing_batch()[:2])
    query, key, value = torch.randn(3, 1, 2, len(rows.at), 8)

    def kernel(queries, keys, values, *_, **settings):
        calls.append((queries.dtype, keys.dtype, values.dtype))
        return queries

    given = ({}, {"dropout": 0.5}, {"is_causal": True}, {"cache": object()}, {"dropout": 0.0, "is_causal": None})
    for settings in given:
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = packing._attention(nn.Module(), query, key, value, None, rows, scaling=1.0, **settings)
        assert found.shape == (1, len(rows.at), 2, 8)
    assert asked == [(torch.device("cpu"), torch.bfloat16, 8)] * 5 and calls == [(torch.bfloat16,) * 3] * 2
    by_length = []
    monkeypatch.setattr(packing, "_by_length", lambda *states, **settings: by_length.append(settings) or states[1])
    for name in ("position_bias", "softcap"):
        packing._attention(nn.Module(), query, key, value, None, rows, **{name: 0.5})
    assert by_length == [{"position_bias": 0.5}, {"softcap": 0.5}] and len(calls) == 2
    monkeypatch.undo()
    assert packing._attention(nn.Module(), query, key, value[..., :4], None, rows)[0].shape[-1] == 4


def test_packed_attention_drops_out_what_it_is_told():
    rows = packing.packed(*sharing_batch()[:2])
    given = torch.randn(3, 1, 2, len(rows.at), 8)
    whole, _ = packing._attention(nn.Module(), *given, None, rows, dropout=0.0)
    less, _ = packing._attention(nn.Module(), *given, None, rows, dropout=0.5)
    assert not torch.equal(less, whole)


@has_kernel
def test_torchs_kernel_takes_these_arguments_and_has_gradients(monkeypatch):
    monkeypatch.setattr(packing, "SHARED", 3)
    monkeypatch.setattr(packing, "kernel_for", lambda *_: packing.varlen_attn)
    monkeypatch.setattr(packing, "_precision", lambda states: torch.bfloat16)
    rows = packing.packed(*sharing_batch()[:2]).to("meta")  # there are shapes and no numbers
    given = [torch.empty(1, heads, len(rows.at), 8, device="meta", requires_grad=True) for heads in (4, 2, 2)]
    found, _ = packing._attention(nn.Module(), *given, None, rows, scaling=0.5)
    assert (found.shape, found.dtype) == ((1, len(rows.at), 4, 8), torch.bfloat16)
    gradients = torch.autograd.grad(found.sum(), given)
    assert [gradient.shape for gradient in gradients] == [each.shape for each in given]


@has_kernel
def test_the_kernel_is_for_halves_on_gpus_that_have_it(monkeypatch):
    gpu, halves = torch.device("cuda"), (torch.float16, torch.bfloat16)
    for capability, there in (((7, 5), None), ((8, 0), packing.varlen_attn), ((9, 0), packing.varlen_attn)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert [packing.kernel_for(gpu, dtype, 64) for dtype in halves] == [there, there]
    others = [
        (torch.device("cpu"), halves[0], 64),
        (gpu, torch.float32, 64),
        (gpu, halves[1], 20),
        (gpu, halves[1], 264),
    ]
    assert [packing.kernel_for(*other) for other in others] == [None] * 4
    assert torch.ops.torch_attn._varlen_attn.default in COSTLY  # selective recomputation keeps what it returns
