"""Runs on the Megatron backend that stop and go on: as if they had not, in the same layout and in others."""

import json
import logging
import os
import random
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.builders import tiny_gpt2_config
from tests.distributed.test_kill import wait_for_a_random_moment
from tests.distributed.test_two_processes import CALM, close
from tests.processes import finish, kill, start, together
from tests.runs import metrics, run
from trlx import checkpoint
from trlx.checkpoint import newest

pytestmark = pytest.mark.distributed

logger = logging.getLogger("trlx")

TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SEQUENCE, CHUNKS = {"sequence_parallel": True}, {"virtual_pipeline_model_parallel_size": 2}
FOUR_LAYERS = {"layers": 4}
DROPOUT = {**FOUR_LAYERS, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
DISTRIBUTED = {"optimizer": {"name": "distributed_fused_adam"}}
AUTO = {"resume_from_checkpoint": "auto"}


def nemo(algorithm, folder, layout, train=None, model=None, **changes):
    """A run, of 8 steps where nothing else is said, with an evaluation every third step."""
    train = {"trainer": f"NeMo{algorithm}Trainer", "trainer_kwargs": layout, "eval_interval": 3, **(train or {})}
    model = {"model_path": tiny_gpt2_config(**FOUR_LAYERS), **(model or {})}
    return run(algorithm, folder, train={"minibatch_size": 2, **train}, model=model, **changes)


STEPS = 6
"""PPO samples before the first of them and, after 4, in the resumed part."""


def in_parts(algorithm, folder, runs):
    """Each run undisturbed, and stopped after the third step and resumed.

    The stopped ones come before the undisturbed one, so that nothing left of them in the process helps to resume.
    """
    for number, (layout, train, changes) in enumerate(runs):
        here, train = folder / str(number), {"total_steps": STEPS, "save_best": False, **train}
        nemo(algorithm, here / "parts", layout, {**train, "total_steps": 3}, **changes)
        trainer = nemo(algorithm, here / "whole", layout, train, **changes)
        # in float32 the second collection takes what the sampler says
        assert trainer.backend.precision != torch.float32 or getattr(trainer, "_is_exact", True)
        nemo(algorithm, here / "parts", layout, {**train, **AUTO}, **changes)


def saved(folder):
    """Every tensor of the newest checkpoint, by file and name."""
    found = newest(folder)
    return {
        (str(file.relative_to(found)), name): tensor
        for file in found.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def check_same(whole, parts, steps=STEPS):
    assert metrics(parts) == metrics(whole)
    assert [line["step"] for line in metrics(whole) if "skipped_steps" in line] == [*range(1, steps + 1)]
    expected, found = saved(whole), saved(parts)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    files = {file.split("-")[0] for file, _ in expected}
    assert {"policy", "optimizer", "dropout"} <= files


IN_PARTS = [
    (TENSOR | PIPELINE | SEQUENCE, {}, {}),
    (PIPELINE | CHUNKS, {"mixed_precision": "bf16"}, {}),
    # with heads, which stay float32, the distributed optimizer has weights of two types
    (TENSOR, {"mixed_precision": "bf16"}, DISTRIBUTED),
    (TENSOR, {}, DISTRIBUTED),
]
"""Layout, ``train`` and other sections of runs on four processes."""
RUNS = {"PPO": [0, 1, 2], "SFT": [1, 3], "ILQL": [2], "GRPO": [0], "DPO": [1], "KTO": [0], "Reward": [1, 2]}
"""Which of them each algorithm has. All share what a backend saves; heads and rows are what an algorithm adds."""


@pytest.mark.parametrize("algorithm", RUNS)
def test_a_resumed_run_is_bit_equal(tmp_path, algorithm):
    dropout = {"model": {"model_path": tiny_gpt2_config(**DROPOUT)}}
    runs = [
        (layout, train, {**dropout, **changes}) for layout, train, changes in map(IN_PARTS.__getitem__, RUNS[algorithm])
    ]
    together(4, in_parts, algorithm, tmp_path, runs)
    for number in range(len(runs)):
        check_same(tmp_path / str(number) / "whole", tmp_path / str(number) / "parts")


@pytest.mark.parametrize("algorithm", ["PPO", "SFT"])
def test_a_resumed_run_of_one_process_is_bit_equal(tmp_path, algorithm):
    # the resumed part begins without the hidden states that the frozen layers gave
    # a guard's mean of the losses before the stop decides which steps are left out after it
    train = {"guards": {"value_loss": {"action": "skip", "above": 0.6}}}
    frozen = {"model": {"num_layers_unfrozen": 1}}
    runs = [({}, {"mixed_precision": precision, **train}, frozen) for precision in (None, "bf16")]
    together(1, in_parts, algorithm, tmp_path, runs)
    for number in range(len(runs)):
        whole, parts = (tmp_path / str(number) / part for part in ("whole", "parts"))
        left_out = [line["step"] for line in metrics(whole) if "skipped_steps" in line and "grad_norm" not in line]
        assert left_out == ([2, 3, 5] if algorithm == "PPO" else [])
        check_same(whole, parts)


def test_rounded_weights_go_on_from_their_float32_copies_where_no_optimizer_was_saved(tmp_path):
    # without momentum, and at one learning rate, there is nothing that the optimizer would have kept
    calm = {"optimizer": {"name": "sgd", "kwargs": {"lr": 0.1}}, "scheduler": {"kwargs": {"eta_min": 0.1}}}
    together(2, in_parts, "SFT", tmp_path, [(TENSOR, {"mixed_precision": "bf16", "save_optimizer": False}, calm)])
    whole, parts = tmp_path / "0" / "whole", tmp_path / "0" / "parts"
    assert metrics(parts) == metrics(whole)
    expected, found = saved(whole), saved(parts)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not any(file.startswith("optimizer") for file, _ in found)
    assert {weight.dtype for weight in whole_tensors(parts, "policy").values()} == {torch.float32}


LONG_ENOUGH, STOP = 20, 10
"""Steps of a float16 run: its loss scale begins at 2^32, and comes down through most of them before weights change."""


def fp16_in_parts(folder):
    for name in ("adamw", "distributed_fused_adam"):
        train = {"mixed_precision": "fp16", "eval_interval": STOP, "save_best": False}
        for part, steps in (("parts", STOP), ("whole", LONG_ENOUGH), ("parts", LONG_ENOUGH)):
            train |= {"total_steps": steps, **AUTO}
            nemo("SFT", folder / name / part, PIPELINE, train, optimizer={"name": name})


def test_a_float16_run_goes_on_with_its_loss_scale(tmp_path):
    together(4, fp16_in_parts, tmp_path)
    for name in ("adamw", "distributed_fused_adam"):
        whole, parts = tmp_path / name / "whole", tmp_path / name / "parts"
        check_same(whole, parts, LONG_ENOUGH)
        # the first overflow is forgiven, and each one after it halves the scale
        scaler = json.loads((parts / f"checkpoint_{STOP}" / "updates.json").read_text())["scaler"]
        assert scaler == {"scale": 2.0 ** (32 - (STOP - 1)), "growth_tracker": 0, "hysteresis_tracker": 2 - STOP}
        skipped = [line["skipped_steps"] for line in metrics(whole) if "skipped_steps" in line]
        assert skipped[STOP - 1] == STOP < skipped[-1] < LONG_ENOUGH


MAGNIFYING = ("values/values_mape_error", "values/clipfrac")
"""One divides by returns that may be next to nothing, the other compares two numbers that are one but for rounding."""


def whole_tensors(folder, kind):
    """The weights, or what the optimizer keeps of them, from the files of all stages."""
    return {name: tensor for (file, name), tensor in saved(folder).items() if file.startswith(f"{kind}-")}


@pytest.mark.parametrize("algorithm", ["PPO", "ILQL"])
def test_a_run_goes_on_in_other_layouts(tmp_path, algorithm):
    # PPO samples: the tokens of each layout are those that the others would have drawn from there on
    whole, turns = tmp_path / "whole", tmp_path / "turns"
    slow = {"optimizer": {"kwargs": {**CALM["kwargs"], "lr": 5e-4}}}  # a longer step magnifies rounding
    together(1, nemo, algorithm, whole, {}, **slow)
    for size, layout, steps in ((2, TENSOR, 3), (2, PIPELINE | CHUNKS, 6), (1, {}, 8)):
        together(size, nemo, algorithm, turns, layout, {"total_steps": steps, **AUTO}, **slow)
    expected, found = metrics(whole), metrics(turns)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        shown = [name for name in theirs if name not in MAGNIFYING]
        assert [mine[name] for name in shown] == pytest.approx([theirs[name] for name in shown], rel=1e-6, abs=1e-6)
    for kind in ("policy", "optimizer"):
        close(whole_tensors(turns, kind), whole_tensors(whole, kind), tolerance=1e-6)


def test_the_files_of_all_stages_are_the_whole_model(tmp_path):
    together(4, nemo, "ILQL", tmp_path, TENSOR | PIPELINE, {"total_steps": 2})
    found = newest(tmp_path)
    assert sorted(file.name for file in found.glob("policy-*")) == [f"policy-{i:03d}.safetensors" for i in range(2)]
    policy, moments = whole_tensors(tmp_path, "policy"), whole_tensors(tmp_path, "optimizer")
    model = AutoModelForCausalLM.from_pretrained(found / "hf_model")
    weights = dict(model.named_parameters())
    heads = load_file(found / "hf_model" / "trlx_heads.safetensors")
    assert policy.keys() == weights.keys() | heads.keys()
    assert all(torch.equal(policy[name], tensor) for name, tensor in {**weights, **heads}.items())
    trained = {name for name in policy if ".targets." not in name}
    assert moments.keys() == {f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in trained}
    assert all(moments[f"exp_avg/{name}"].shape == policy[name].shape for name in trained)


def resume_other(folder):
    """Every process is told, also the stage that has nothing to object to."""
    top = {"model": {"num_layers_unfrozen": 1}}
    nemo("SFT", folder / "top", PIPELINE, {"total_steps": 1}, **top)
    nemo("SFT", folder / "all", PIPELINE, {"total_steps": 1})
    more, fewer = "holds other trained weights .*transformer.h.2", "holds other trained weights .*transformer"
    with pytest.raises(ValueError, match=more):
        nemo("SFT", folder / "top", PIPELINE, AUTO, model={"num_layers_unfrozen": 2})
    with pytest.raises(ValueError, match=fewer):
        nemo("SFT", folder / "all", PIPELINE, AUTO, **top)


def test_a_checkpoint_of_other_trained_weights_is_refused(tmp_path):
    together(2, resume_other, tmp_path)


def terminate_the_last(folder, layout):
    """A run whose last process alone gets SIGTERM in the second step."""
    from trlx.backends.megatron.backend import MegatronBackend

    step, calls = MegatronBackend.train_step, []

    def train_step(*args):
        calls.append(1)
        if os.environ["RANK"] == "3" and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    MegatronBackend.train_step = train_step
    nemo("PPO", folder, layout, {"checkpoint_interval": 100})


def test_a_signal_to_a_process_that_is_not_the_main_one_stops_all_after_a_save(tmp_path):
    assert finish(start(4, terminate_the_last, tmp_path, TENSOR | PIPELINE)) == [75] * 4
    assert newest(tmp_path).name == "checkpoint_2"


KILLS = 3
LONG = {"checkpoint_interval": 1, "eval_interval": 3, "total_steps": 16, "epochs": 100}


def check_readable(folder):
    """Everything that looks like a checkpoint is whole."""
    found = [path for path in folder.iterdir() if path.name.startswith(("checkpoint_", "best_checkpoint"))]
    for path in found:
        state, _ = checkpoint.read_state(path)
        tensors = {file.name: load_file(file) for file in path.glob("*.safetensors")}
        assert (
            state["schedule"]["step"] >= 0 and {"policy-000.safetensors", "optimizer-000.safetensors"} <= tensors.keys()
        )
    if found:
        AutoModel.from_pretrained(max(found) / "hf_model")


def test_a_run_killed_again_and_again_ends_like_one_left_in_peace(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    together(2, nemo, "PPO", whole, PIPELINE, LONG)
    killed.mkdir()
    dice = random.Random("two stages")
    for _ in range(KILLS):
        ranks = start(2, nemo, "PPO", killed, PIPELINE, {**LONG, **AUTO})
        wait_for_a_random_moment(dice, ranks, killed)
        assert all(process.is_alive() for process in ranks), "the run ended before it could be killed"
        kill(dice.sample(ranks, 2))
        check_readable(killed)
    together(2, nemo, "PPO", killed, PIPELINE, {**LONG, **AUTO})
    assert metrics(killed) == metrics(whole)
    expected, found = saved(whole), saved(killed)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def rates(folder):
    return [line["learning_rate_group_0"] for line in metrics(folder) if "learning_rate_group_0" in line]


def go_on_otherwise(folder, said_file):
    """Runs that go on without running averages, with a schedule of another length, and with another optimizer; and one
    of another backend."""
    # a linear fall over total_steps, 1e-2 (1 - n / total_steps) with n steps done
    falling = {
        "optimizer": {"kwargs": {"lr": 1e-2, "weight_decay": 0.0}},
        "scheduler": {"name": "WarmupAnnealing", "kwargs": {"T_max": None, "eta_min": None, "min_lr": 0.0}},
    }
    said = []
    logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())
    nemo("SFT", folder / "length", {}, {"total_steps": 2}, **falling)
    nemo("SFT", folder / "length", {}, {"total_steps": 4, **AUTO}, **falling)
    nemo("SFT", folder / "without", {}, {"total_steps": 3, "save_optimizer": False})
    nemo("SFT", folder / "without", {}, {"total_steps": 4, **AUTO})
    sgd = {"optimizer": {"name": "sgd", "kwargs": {"momentum": 0.9}}}
    nemo("SFT", folder / "without", {}, {"total_steps": 5, **AUTO}, **sgd)
    run("SFT", folder / "other", train={"total_steps": 1})
    with pytest.raises(ValueError, match="train.trainer is of another backend"):
        nemo("SFT", folder / "other", {}, AUTO)
    said_file.write_text("\n".join(said))


def test_a_run_goes_on_with_other_settings(tmp_path):
    together(1, go_on_otherwise, tmp_path, tmp_path / "said")
    assert rates(tmp_path / "length") == pytest.approx([1e-2, 5e-3, 5e-3, 2.5e-3], abs=1e-9)
    # cosine of the tiny runs: 1e-4 + 2.9e-3 (1 + cos(pi n / 50)) / 2 at n = 3 and 4
    assert rates(tmp_path / "without")[3:] == pytest.approx([2.974317e-3, 2.954448e-3], abs=1e-8)
    # one step of Adam and one of SGD are all that the averages are of; the first of Adam moves weights by its rate
    counts = [json.loads((tmp_path / "without" / f"checkpoint_{n}" / "updates.json").read_text()) for n in (3, 4, 5)]
    assert [(each["step_count"], each["averaged_steps"]) for each in counts] == [(3, 3), (4, 1), (5, 1)]
    then, now = (load_file(tmp_path / "without" / f"checkpoint_{n}" / "policy-000.safetensors") for n in (3, 4))
    moved = torch.cat([(now[name] - then[name]).abs().flatten() for name in then])
    assert float(moved[moved > 0].median()) == pytest.approx(2.974317e-3, abs=1e-5)
    said = (tmp_path / "said").read_text()
    for line in ("schedule: ", "train.save_optimizer was false then", "the optimizer's running averages start anew"):
        assert line in said
