"""The same numbers as TRL, where both define the same thing. TRL is the extra [bench]."""

from collections import defaultdict
from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
import torch

from tests.unit.test_method_pages import FROM_TRL, names, rows, sections
from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.advantages import group_advantages
from trlx.methods.grpo import UNITS, grpo_loss

trl = pytest.importorskip("trl", reason="compares with TRL: pip install 'trlx[bench]'")

ROWS, WIDTH, PROMPT = 6, 9, 3


def numbers():
    """Six ragged responses in two groups: what a policy, its old self and its reference say."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 4, 1, 3, 6, 2])
    mask = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, PROMPT : PROMPT + length] = True
    logprobs, old, reference = (-torch.rand(ROWS, WIDTH, generator=draw) * 2 for _ in range(3))
    scores = torch.tensor([1.0, 0.0, 2.5, -1.0, 3.0, 3.0])
    return mask, logprobs.requires_grad_(), old, reference, scores


def of_trl(mask, logprobs, old, reference, advantages, loss_type, level, beta):
    """The loss of TRL's GRPOTrainer, which gets the log-probabilities of completions alone."""
    from trl import GRPOTrainer

    inside = slice(PROMPT, None)
    said = logprobs[:, inside], torch.zeros(ROWS, WIDTH - PROMPT), None  # with entropies and the loss of a router
    processes = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    trainer = SimpleNamespace(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        beta=beta,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=0.2,
        epsilon_high=0.3,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        max_completion_length=WIDTH - PROMPT,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        accelerator=processes,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: said,
    )
    inputs = {
        "prompt_ids": torch.ones(ROWS, PROMPT).long(),
        "prompt_mask": torch.ones(ROWS, PROMPT).long(),
        "completion_ids": torch.ones(ROWS, WIDTH - PROMPT).long(),
        "completion_mask": mask[:, inside].long(),
        "advantages": advantages,
        "old_per_token_logps": old[:, inside],
        "ref_per_token_logps": reference[:, inside],
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kind", "loss_type", "level"),
    [
        ("grpo", "grpo", "token"),
        ("dr_grpo", "dr_grpo", "token"),
        ("dapo", "dapo", "token"),
        ("gspo", "grpo", "sequence"),
    ],
)
def test_loss_and_gradient_are_trls(kind, loss_type, level, beta):
    mask, logprobs, old, reference, scores = numbers()
    advantages = group_advantages(scores, torch.tensor([0, 0, 0, 1, 1, 1]), "grpo")
    theirs = of_trl(mask, logprobs, old, reference, advantages, loss_type, level, beta)
    (wanted,) = torch.autograd.grad(theirs, logprobs)
    batch = TokenBatch(torch.ones(ROWS, WIDTH).long(), mask | True, mask, torch.zeros(ROWS, WIDTH))
    batch = batch.replace(old_logprobs=old, ref_logprobs=reference, advantages=advantages[:, None] * mask)
    summed, _ = grpo_loss(TokenOutputs(logprobs), batch, kind, 0.2, 0.3, WIDTH - PROMPT, kl_coef=beta)
    ours = summed / UNITS[kind].count(batch)
    (gradient,) = torch.autograd.grad(ours, logprobs)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert torch.allclose(gradient, wanted * mask, atol=1e-5)


@pytest.mark.parametrize(
    ("heading", "config"),
    [
        ("all trainers", "GRPOConfig"),
        ("GRPO", "GRPOConfig"),
        ("SFT", "SFTConfig"),
        ("DPO", "DPOConfig"),
        ("KTO", "KTOConfig"),
        ("reward models", "RewardConfig"),
    ],
)
def test_the_settings_that_the_documentation_names_are_trls_with_these_defaults(heading, config):
    known = {field.name: field for field in fields(getattr(trl, config))}
    ((_, text),) = sections(FROM_TRL, f"Settings of {heading}")
    told = {name: row[1].strip("`") for row in rows(text) if len(row) == 5 for name in names(row[0])}
    told.pop("learning_rate", None)  # each trainer has its own
    theirs = {
        name: known[name].default_factory() if known[name].default is MISSING else known[name].default for name in told
    }
    assert told and told == {name: str(default) for name, default in theirs.items()}
