"""The Megatron backend computes what the Accelerate backend computes, in every layout: scores, gradients, weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.builders import VOCABULARY, char_tokenizer, tiny_gpt2_config
from tests.processes import together
from trlx.backends.accelerate import AccelerateBackend
from trlx.backends.base import ModelNeeds
from trlx.batch import Rollout, TokenBatch
from trlx.config import ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from trlx.data.collate import collate
from trlx.data.store import shard
from trlx.methods.grpo import grpo_loss
from trlx.methods.ilql import ilql_loss
from trlx.methods.ppo import ppo_loss
from trlx.methods.preferences import dpo_loss, kto_loss
from trlx.methods.reward import reward_loss
from trlx.methods.sft import sft_loss
from trlx.methods.units import Unit

pytestmark = pytest.mark.distributed

ROWS = 8
EOS = 2
"""Ends every response, begins every prompt, and pads: where pad is eos, eos must train like any other token."""
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.15,
    pad_token_id=EOS,
)
FAMILIES = {
    "gpt2": tiny_gpt2_config(layers=4, initializer_range=0.15),
    "llama": hf.LlamaConfig(**SIZES),
    "qwen2": hf.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False),
    "gemma": hf.GemmaConfig(**{**SIZES, "num_key_value_heads": 4}, head_dim=16),
    "gpt_neox": hf.GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None}),
}
NEEDS = {
    "PPO": ModelNeeds(value_head=True, reference=True, dropout=False, temperature=0.7),
    "ILQL": ModelNeeds(value_head=True, q_heads=2, dropout=False),
    "SFT": ModelNeeds(dropout=False),
    "GRPO": ModelNeeds(reference=True, dropout=False),
    "Reward": ModelNeeds(score_head=True, dropout=False),
}
LOSSES = {
    "PPO": partial(ppo_loss, cliprange=0.2, cliprange_value=0.2, vf_coef=1.0, dual_clip=None),
    "ILQL": partial(ilql_loss, tau=0.7, gamma=0.9, cql_scale=0.1, awac_scale=1.0, beta=0.5),
    "SFT": sft_loss,
    "GRPO": partial(grpo_loss, kind="gspo", cliprange=0.2, cliprange_high=0.3, max_length=8, kl_coef=0.1),
    "Reward": partial(reward_loss, center_coef=0.1),
}
UNITS = {"GRPO": Unit.SEQUENCE, "Reward": Unit.PAIR}
WITHOUT_HEADS = [
    (partial(dpo_loss, kind="sigmoid", beta=0.1), Unit.PAIR),
    (partial(kto_loss, kl=0.5, beta=0.1, undesirable_weight=1.5), Unit.SEQUENCE),
]


def steps(family: str, algorithm: str) -> list[tuple]:
    others = WITHOUT_HEADS if (family, algorithm) == ("gpt2", "SFT") else []
    return [(LOSSES[algorithm], UNITS.get(algorithm, Unit.TOKEN))] * 3 + others


MAIN = {"gpt2": tuple(LOSSES), "llama": ("PPO", "ILQL", "SFT"), "qwen2": ("PPO", "ILQL", "SFT")}
"""What is compared in all layouts. Losses of other methods are the same code for every family, so one is enough."""
OTHERS = [("qwen3", "PPO"), ("gemma", "ILQL"), ("gpt_neox", "PPO"), ("llama", "Reward")]


def settings(model, minibatch_size=2, unfrozen=-1, data_size=1, **trainer_kwargs) -> dict:
    """What both backends are built from."""
    return {
        "model": ModelConfig(model, num_layers_unfrozen=unfrozen),
        # where a gradient is 0 but for rounding, as attention's key bias, Adam's division would make it a step
        "optimizer": OptimizerConfig("adamw", {"lr": 1e-3, "eps": 1e-4}),
        "scheduler": SchedulerConfig("cosine_annealing", {"T_max": 10}),
        "train": TrainConfig(
            total_steps=10,
            seq_length=24,
            epochs=1,
            batch_size=ROWS // data_size,
            minibatch_size=minibatch_size,
            checkpoint_interval=10,
            eval_interval=10,
            pipeline="PromptPipeline",
            trainer="any",
            trainer_kwargs=trainer_kwargs,
        ),
        "tokenizer": char_tokenizer(pad_is_eos=True),
    }


def rows() -> TokenBatch:
    """Eight ragged rows with everything a loss may look at."""
    draw = torch.Generator().manual_seed(3)

    def ids(most):
        return torch.randint(3, VOCABULARY, (int(torch.randint(1, most, (), generator=draw)),), generator=draw).tolist()

    batch = collate([Rollout([EOS, *ids(5)], [*ids(8), EOS], 1.0 - i / 4) for i in range(ROWS)], EOS)
    columns = {
        name: torch.randn(batch.tokens.shape, generator=draw) * batch.response_mask
        for name in ("old_values", "advantages", "returns", "ref_logprobs")
    }
    return batch.replace(**columns)


def with_old_logprobs(batch: TokenBatch, outputs) -> TokenBatch:
    """Old log-probabilities near the present ones, so that some ratios are clipped and some are not."""
    draw = torch.Generator().manual_seed(4)
    moved = outputs.logprobs + 0.2 * torch.randn(batch.tokens.shape, generator=draw)
    return batch.replace(old_logprobs=moved * batch.response_mask)


def write_truth(folder: Path, family: str, algorithm: str, unfrozen: int = -1) -> None:
    """Everything the Accelerate backend computes, in files."""
    folder.mkdir()
    built = settings(FAMILIES[family], unfrozen=unfrozen)
    backend = AccelerateBackend(**built, needs=NEEDS[algorithm])
    with torch.no_grad():
        for weight in backend.policy.heads.parameters() if backend.policy.heads is not None else ():
            weight.add_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))  # values that are not all 0
    (folder / "model").mkdir()
    backend.export_hf(folder / "model")
    batch = with_old_logprobs(rows(), backend.evaluate(rows()))
    save_file({name: column.contiguous() for name, column in batch.columns().items()}, folder / "batch.safetensors")
    save_file(_columns(backend.policy(batch.tokens, batch.attention_mask, batch.response_mask)), folder / "scores")
    loss, _ = LOSSES[algorithm](backend.policy(batch.tokens, batch.attention_mask, batch.response_mask), batch)
    (loss / batch.response_mask.sum()).backward()
    save_file(_gradients(backend.policy), folder / "gradients")
    backend.policy.zero_grad()
    metrics = [backend.train_step(batch, *step) for step in steps(family, algorithm)]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    save_file(_weights(backend.policy), folder / "trained")


def _columns(outputs) -> dict[str, torch.Tensor]:
    named = {name: getattr(outputs, name) for name in ("logprobs", "values", "q", "target_q", "q_logprobs")}
    named["last"] = None if outputs.last is None else outputs.last[:, None]
    return {name: column.detach().contiguous() for name, column in named.items() if column is not None}


def _parameters(policy) -> dict[str, torch.nn.Parameter]:
    """By the names they have in files, where GPT-NeoX's output head has its own."""
    heads = policy.heads.named_parameters() if policy.heads is not None else ()
    named = dict([*policy.model.named_parameters(), *heads])
    if policy.model.config.model_type == "gpt_neox":
        named["embed_out.weight"] = named.pop("lm_head.weight")
    return named


def _gradients(policy) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in _parameters(policy).items()}


def _weights(policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in _parameters(policy).items()}


def compare(folder: Path, cases: list[tuple[str, str]], layouts: list[dict], unfrozen: int = -1) -> None:
    """In the processes of a job: everything equals what is in the files."""
    for layout in layouts:  # its process groups serve all cases
        for family, algorithm in cases:
            try:
                compare_one(folder, family, algorithm, layout, unfrozen)
            except AssertionError as error:
                raise AssertionError(f"{family} {algorithm} {layout}: {error}") from error


def compare_one(truth: Path, family: str, algorithm: str, layout: dict, unfrozen: int) -> None:
    folder = truth / f"{family}-{algorithm}"
    backend = megatron(folder / "model", family, algorithm, layout, unfrozen)
    batch = TokenBatch(**load_file(folder / "batch.safetensors"))
    mine = shard(batch, list(range(ROWS)), backend.data_rank, backend.data_size)
    first = compare_outputs(folder, backend, mine)
    compare_gradients(folder, backend, mine, algorithm)
    metrics = [backend.train_step(mine, *step) for step in steps(family, algorithm)]
    for found, expected in zip(metrics, json.loads((folder / "metrics.json").read_text()), strict=True):
        assert found.keys() == expected.keys()
        # how much is padding depends on how rows are divided
        shown = [name for name in expected if not name.startswith("time/") and name != "padding_percentage"]
        for name in shown:
            # rounding decides whether a token that stands at the clipping range counts as clipped
            margin = 1 / float(batch.response_mask.sum()) if "clipfrac" in name else 2e-5
            assert found[name] == pytest.approx(expected[name], abs=margin, rel=1e-5), name
    compare_trained(folder, backend)
    if NEEDS[algorithm].reference:
        assert torch.equal(backend.evaluate(mine, reference=True).logprobs, first)
        assert torch.equal(backend.evaluate(mine).logprobs, first) is (unfrozen == 0)


def megatron(model, family: str, algorithm: str, layout: dict, unfrozen: int = -1):
    from trlx.backends.megatron.backend import MegatronBackend

    size = layout.get("tensor_model_parallel_size", 1) * layout.get("pipeline_model_parallel_size", 1)
    data_size = world() // size
    # how microbatches follow one another does not depend on the family
    built = settings(str(model), 2 if family == "gpt2" else 4, unfrozen, data_size, **layout)
    return MegatronBackend(**built, needs=NEEDS[algorithm])


def world() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", 1))


def compare_outputs(folder: Path, backend, mine: TokenBatch) -> torch.Tensor:
    outputs, truth = backend.evaluate(mine), load_file(folder / "scores")
    at = slice(backend.data_rank * len(mine), (backend.data_rank + 1) * len(mine))
    width = mine.tokens.shape[1]
    for name in ("logprobs", "values", "last"):
        if name in truth:
            assert_close(_columns(outputs)[name], truth[name][at, :width], name)
    return outputs.logprobs


def compare_gradients(folder: Path, backend, mine: TokenBatch, algorithm: str) -> None:
    from trlx.backends.megatron.schedule import run_forward_backward

    truth, stored = load_file(folder / "gradients"), load_file(folder / "scores")
    units = TokenBatch(**load_file(folder / "batch.safetensors")).response_mask.sum()
    start = backend.data_rank * len(mine)
    rows = backend.microbatches(mine, together=2)
    microbatches = backend._microbatches(mine, rows)

    def loss(outputs, microbatch):
        number = next(i for i, each in enumerate(microbatches) if each is microbatch)
        at = [start + row for row in rows[number]]
        for name, column in _columns(outputs).items():
            expected = stored[name][..., at, :]
            width = min(column.shape[-1], expected.shape[-1])
            assert_close(column[..., :width], expected[..., :width], name)
        return LOSSES[algorithm](outputs, microbatch)[0] * backend.data_size / units, None

    for chunk in backend.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    run_forward_backward(backend.wrapped, microbatches, loss)
    for weight in backend.weights.weights:
        shard = weight.entry.shard(
            lambda name: truth[name], backend.parallel.tensor_rank, backend.parallel.sizes.tensor
        )
        found = weight.value.main_grad if weight.value.requires_grad else torch.zeros_like(shard)
        assert_close(found, shard, f"gradient of {weight.name}")


def compare_trained(folder: Path, backend) -> None:
    truth = load_file(folder / "trained")
    for weight in backend.weights.weights:
        shard = weight.entry.shard(
            lambda name: truth[name], backend.parallel.tensor_rank, backend.parallel.sizes.tensor
        )
        assert_close(weight.value.detach(), shard, f"trained {weight.name}")


def own_shard(backend, weight, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    state = backend.parallel
    return weight.entry.shard(lambda name: whole[name], state.tensor_rank, state.sizes.tensor)


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    difference = float((found - expected).abs().max())
    assert difference < 1e-5 * max(1.0, float(expected.abs().max())), f"{what} differs by {difference}"


def layout(tensor=1, pipeline=1, sequence=False, virtual=None) -> dict:
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "sequence_parallel": sequence,
        "virtual_pipeline_model_parallel_size": virtual,
    }


LAYOUTS = {
    1: [layout()],
    2: [layout(2), layout(2, sequence=True), layout(1, 2), layout(1, 2, virtual=2), layout()],
    4: [
        layout(2, 2),
        layout(2, 2, sequence=True),
        layout(2, 1),
        layout(2, 1, sequence=True),
        layout(1, 2),
        layout(2, 2, sequence=True, virtual=2),
    ],
}
"""By number of processes; those that are left are data ranks."""


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    cases = [(family, algorithm) for family, algorithms in MAIN.items() for algorithm in algorithms]
    for family, algorithm in [*cases, *OTHERS]:
        write_truth(folder / f"{family}-{algorithm}", family, algorithm)
    return folder


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("size", LAYOUTS)
def test_scores_gradients_and_weights_are_those_of_the_accelerate_backend(truth, size, family):
    together(size, compare, truth, [(family, algorithm) for algorithm in MAIN[family]], LAYOUTS[size])


def test_so_they_are_for_the_other_families(truth):
    together(2, compare, truth, OTHERS, [layout(2, sequence=True), layout(1, 2)])


@pytest.mark.parametrize("unfrozen", [0, 1])
def test_exactly_the_top_blocks_train(tmp_path, unfrozen):
    for algorithm, score in (("PPO", set()), ("Reward", {"score.weight"})):
        folder = tmp_path / f"gpt2-{algorithm}"
        write_truth(folder, "gpt2", algorithm, unfrozen)
        before, after = load_file(folder / "model" / "model.safetensors"), load_file(folder / "trained")
        changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
        assert score <= changed and bool(changed - score) is bool(unfrozen)
        assert all(name.startswith(("transformer.h.3.", "transformer.ln_f.")) for name in changed - score)
    cases = [("gpt2", "PPO"), ("gpt2", "Reward")]
    together(2, compare, tmp_path, cases, [layout(2), layout(1, 2), layout(1, 2, virtual=2)], unfrozen)
    together(4, compare, tmp_path, cases, [layout(1, 4), layout(2, 2, sequence=True)], unfrozen)
