"""The same losses on pairs as TRL, where both define the same thing. TRL is the extra [bench]."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import finish, pack
from trlx.methods.preferences import dpo_loss

trl = pytest.importorskip("trl", reason="compares with TRL: pip install 'trlx[bench]'")

PAIRS, WIDTH, PROMPT = 3, 9, 3


def numbers():
    """Three pairs of ragged answers: what a policy and its reference say about each token."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.zeros(2 * PAIRS, WIDTH, dtype=torch.bool)
    for row, length in enumerate((6, 4, 1, 3, 6, 2)):
        mask[row, PROMPT : PROMPT + length] = True
    logprobs, reference = (-torch.rand(2 * PAIRS, WIDTH, generator=draw) * 2 * mask for _ in range(2))
    return mask, logprobs.requires_grad_(), reference


def of_trl(mask, logprobs, reference, loss_type, beta):
    """The loss of TRL's DPOTrainer, whose batch has all chosen answers first and whose token t + 1 stands at t."""
    from trl import DPOTrainer

    def theirs(x):
        return torch.cat([x[0::2], x[1::2]])

    def model(**_):
        said = theirs(logprobs)[:, 1:]
        logged = torch.zeros_like(said)
        return SimpleNamespace(log_probs=said, entropy=logged, mean_logits=logged, is_top1=logged > 0)

    sums = theirs(reference).sum(dim=1)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones(2 * PAIRS, WIDTH).long(),
        "attention_mask": torch.ones(2 * PAIRS, WIDTH).long(),
        "completion_mask": theirs(mask).long(),
        "ref_chosen_logps": sums[:PAIRS],
        "ref_rejected_logps": sums[PAIRS:],
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, False), trainer._metrics["train"]


@pytest.mark.parametrize(
    ("loss_type", "kind", "length_normalized"),
    [
        ("sigmoid", "sigmoid", False),
        ("hinge", "hinge", False),
        ("ipo", "ipo", True),
        ("sigmoid_norm", "sigmoid", True),
    ],
)
def test_loss_and_gradient_are_trls(loss_type, kind, length_normalized):
    mask, logprobs, reference = numbers()
    theirs, logged = of_trl(mask, logprobs, reference, loss_type, 0.3)
    (wanted,) = torch.autograd.grad(theirs, logprobs)
    batch = TokenBatch(torch.ones(2 * PAIRS, WIDTH).long(), mask | True, mask, torch.zeros(2 * PAIRS, WIDTH))
    batch = batch.replace(ref_logprobs=reference)
    summed, found = dpo_loss(TokenOutputs(logprobs), batch, kind, 0.3, length_normalized=length_normalized)
    (gradient,) = torch.autograd.grad(summed / PAIRS, logprobs)
    assert (summed / PAIRS).item() == pytest.approx(theirs.item(), abs=1e-5)
    assert torch.allclose(gradient, wanted * mask, atol=1e-5)
    assert gradient.abs().max() > 1e-3
    if not length_normalized:  # TRL's rewards are of sums in any case
        found, names = finish(*pack(found)), {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
        names |= {f"rewards/{half}": f"rewards/{half}" for half in ("chosen", "rejected")}
        names |= {f"logps/{half}": f"logprobs/{half}" for half in ("chosen", "rejected")}
        wanted = {name: logged[name][0] for name in names}
        assert {name: found[here] for name, here in names.items()} == pytest.approx(wanted, abs=1e-5)
