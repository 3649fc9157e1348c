"""The same losses on pairs and labelled answers as TRL, where both define the same. TRL is the extra [bench]."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tests.runs import run
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


def logged_by(model):
    """`model` as TRL calls it: log-probabilities, of token t + 1 at t and 0 where the label is -100."""

    def said(input_ids, attention_mask, labels, **_):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        found = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
        nothing = torch.zeros_like(found)
        return SimpleNamespace(log_probs=found, entropy=nothing, mean_logits=nothing)

    return said


def kto_of_trl(model, batch, others, method):
    """The loss of TRL's KTOTrainer on `batch`; z is estimated from `others`."""
    from trl import KTOTrainer

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=method.beta,
        desirable_weight=method.desirable_weight,
        undesirable_weight=method.undesirable_weight,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda *given: KTOTrainer._compute_kl_logps(trainer, *given)
    inputs = {"label": batch.scores.sum(dim=1) > 0}
    for kl, rows in (("KL_", others), ("", batch)):
        inputs[f"{kl}input_ids"], inputs[f"{kl}attention_mask"] = rows.tokens, rows.attention_mask.long()
        inputs[f"{kl}completion_mask"] = rows.response_mask.long()
        inputs[f"ref_{kl}logps"] = rows.ref_logprobs.sum(dim=1)
    return KTOTrainer._compute_loss(trainer, logged_by(model), inputs, False), trainer._metrics["train"]


def test_ktos_loss_and_gradient_are_trls_on_one_model_and_batch(tmp_path):
    trainer = run("KTO", tmp_path, method={"desirable_weight": 0.7}, train={"total_steps": 6, "batch_size": 7})
    policy = trainer.backend.policy
    batch, others = (store.rows(slice(None)) for store in (trainer.samples, trainer.mismatched))
    theirs, logged = kto_of_trl(policy.model, batch, others, trainer.method)
    wanted = torch.autograd.grad(theirs, list(policy.model.parameters()))
    trainer._next_batch()  # z of these seven rows, which are all
    summed, found = trainer.loss(policy(batch.tokens, batch.attention_mask, batch.response_mask), batch)
    gradient = torch.autograd.grad(summed / len(batch), list(policy.model.parameters()))
    assert logged["kl"][0] > 0.01 and trainer.kl == pytest.approx(logged["kl"][0], abs=1e-5)
    assert (summed / len(batch)).item() == pytest.approx(theirs.item(), abs=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(gradient, wanted, strict=True)) < 1e-5
    assert max(float(weight.abs().max()) for weight in gradient) > 1e-3
    found = finish(*pack(found))
    for name in ("kl", "rewards/chosen", "rewards/rejected"):
        assert found[name] == pytest.approx(logged[name][0], abs=1e-5)
