"""Whole training runs: the same script on both backends gives the same curves, and what one writes the other reads."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, T5Config

from tests.builders import char_tokenizer, tiny_gpt2_config
from tests.distributed.test_two_processes import CALM, NO_DROPOUT, close
from tests.processes import together
from tests.runs import DATA, WITH_MARGIN, metrics, run, tiny_config
from tests.unit.test_reward_model_trainer import scores_of
from trlx import SequenceClassifierReward
from trlx.checkpoint import newest

pytestmark = pytest.mark.distributed

GREEDY = {
    "PPO": {"gen_kwargs": {"max_new_tokens": 6, "top_k": 1}},
    "SFT": {"gen_kwargs": {"max_new_tokens": 6, "do_sample": False}},
    "DPO": {"gen_kwargs": {"max_new_tokens": 6, "do_sample": False}, "sft_coef": 0.1},
    "KTO": {"gen_kwargs": {"max_new_tokens": 6, "do_sample": False}},
    "ILQL": {"gen_kwargs": {"max_new_tokens": 6, "do_sample": False, "beta": [0, 2]}},
    "Reward": {"center_coef": 0.01},
}


BEGINNINGS = {"Reward": tiny_gpt2_config(layers=4, initializer_range=0.15)}
"""Models whose gradients do not magnify rounding."""


STEPS = {"PPO": 12, "SFT": 12, "ILQL": 12, "DPO": 6, "KTO": 6, "Reward": 6}


def curve(trainer: str, algorithm: str, folder, data_size=1, **options) -> None:
    """A run on rows that no random number chooses."""
    steps = STEPS[algorithm]
    train = {
        "trainer": f"{trainer}{algorithm}Trainer",
        "trainer_kwargs": options,
        "total_steps": steps,
        "batch_size": 4 // data_size,
        "minibatch_size": 2,
        "eval_interval": steps // 2,
        "checkpoint_interval": steps,
    }
    model = {"model_path": BEGINNINGS.get(algorithm) or tiny_gpt2_config(layers=4)}
    changes = {"model": model, "optimizer": CALM, "train": train}
    trainer = run(algorithm, folder, method=GREEDY[algorithm], **changes)
    (folder / "parameters.json").write_text(json.dumps(trainer.backend.parameter_counts()))


@pytest.mark.parametrize("algorithm", GREEDY)
def test_the_curves_of_both_backends_agree(tmp_path, algorithm):
    together(1, curve, "Accelerate", algorithm, tmp_path / "accelerate")
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    together(4, curve, "NeMo", algorithm, tmp_path / "layers", **layout)
    together(2, curve, "NeMo", algorithm, tmp_path / "rows", 2)
    one = metrics(tmp_path / "accelerate")
    loader = AutoModelForSequenceClassification if algorithm == "Reward" else AutoModelForCausalLM
    assert sum("grad_norm" in line for line in one) == STEPS[algorithm]
    for folder in ("layers", "rows"):
        other = metrics(tmp_path / folder)
        assert len(one) == len(other)
        counts = [(tmp_path / name / "parameters.json").read_text() for name in ("accelerate", folder)]
        assert counts[0] == counts[1]
        for mine, theirs in zip(one, other, strict=True):
            assert mine.keys() == theirs.keys()
            left_out = {"padding_percentage"}  # each process trims its own rows
            # before the first update the policy is the reference: which answer it prefers is a matter of rounding
            if abs(mine.get("margin", mine.get("eval/margin", 1.0))) < 1e-6:
                left_out |= {"accuracy", "eval/accuracy"}
            shown = [name for name in mine if name not in left_out]
            assert [theirs[name] for name in shown] == pytest.approx([mine[name] for name in shown], abs=1e-4, rel=1e-4)
        exported = [
            loader.from_pretrained(newest(tmp_path / name) / "hf_model").state_dict() for name in ("accelerate", folder)
        ]
        close(*exported, tolerance=1e-4)


@pytest.mark.parametrize("algorithm", ["ILQL", "PPO", "Reward"])
def test_interleaved_stages_take_any_number_of_microbatches(tmp_path, algorithm):
    # 7 rows in batches of 4, one at a time: 3 microbatches are left for two stages at the end; of 7 pairs, one pair
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    method = {"num_rollouts": 7, "chunk_size": 7} if algorithm == "PPO" else {}
    rows = 2 if algorithm == "Reward" else 1
    for trainer, size, options in (("Accelerate", 1, {}), ("NeMo", 2, layout)):
        train = {"trainer": f"{trainer}{algorithm}Trainer", "trainer_kwargs": options, "minibatch_size": rows}
        changes = {"train": {**train, "total_steps": 4}, "method": {**GREEDY[algorithm], **method}, "optimizer": CALM}
        model = {"model_path": tiny_gpt2_config(layers=4)}
        together(size, run, algorithm, tmp_path / trainer, model=model, **changes)
    for mine, theirs in zip(metrics(tmp_path / "Accelerate"), metrics(tmp_path / "NeMo"), strict=True):
        shown = [name for name in mine if name != "padding_percentage"]
        assert [theirs[name] for name in shown] == pytest.approx([mine[name] for name in shown], abs=1e-4, rel=1e-4)


def sft_then_ppo(folder, first: str, second: str, **options) -> None:
    """Trains on one backend, exports to a hub, and goes on with the other."""
    import huggingface_hub

    import trlx
    from tests.unit.test_hub import Hub

    huggingface_hub.HfApi, Hub.root = Hub, folder
    layout = {"Accelerate": {}, "NeMo": options}
    train = {"trainer": f"{first}SFTTrainer", "trainer_kwargs": layout[first], "tracker": ["tensorboard"]}
    trainer = trlx.train(config=tiny_config(folder / "sft", "SFT", train=train), **DATA["SFT"])
    assert trainer.push_to_hub("me/exported").endswith("/me/exported")
    assert [call[0] for call in Hub.calls] == (["create", "upload"] if trainer.backend.is_main else [])
    model = {"model_path": str(folder / "me" / "exported")}
    train = {"trainer": f"{second}PPOTrainer", "trainer_kwargs": layout[second], "total_steps": 2}
    trlx.train(config=tiny_config(folder / "ppo", "PPO", model=model, train=train), **DATA["PPO"])


@pytest.mark.parametrize(("first", "second"), [("Accelerate", "NeMo"), ("NeMo", "Accelerate")])
def test_training_goes_on_with_the_other_backend(tmp_path, first, second):
    together(2, sft_then_ppo, tmp_path, first, second, tensor_model_parallel_size=2)
    step = next(line for line in metrics(tmp_path / "ppo") if "policy/kl" in line)
    assert step["policy/kl"] == 0.0 and step["policy/ratio_deviation/max"] < 1e-5
    assert len(list((tmp_path / "sft" / "tensorboard").iterdir())) == 1
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "me" / "exported").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(newest(tmp_path / "ppo") / "hf_model").state_dict()
    assert exported.keys() == trained.keys()
    assert 0 < max(float((exported[name] - trained[name]).abs().max()) for name in exported) < 0.1


def heads_of(folder, first: str, second: str) -> None:
    """The heads that one backend trained, and what the other starts from."""
    layout = {"Accelerate": {}, "NeMo": {"pipeline_model_parallel_size": 2}}
    exported = {"model": {"model_path": str(folder / "one" / "export")}}
    for name, trainer, algorithm in (("one", first, "ILQL"), ("two", second, "ILQL"), ("ppo", second, "PPO")):
        train = {"trainer": f"{trainer}{algorithm}Trainer", "trainer_kwargs": layout[trainer]}
        train["total_steps"] = 3 if name == "one" else 0
        model = {} if name == "one" else exported
        run(algorithm, folder / name, train=train, **model).save_pretrained(folder / name / "export")


@pytest.mark.parametrize(("first", "second"), [("Accelerate", "NeMo"), ("NeMo", "Accelerate")])
def test_heads_cross_too(tmp_path, first, second):
    from safetensors.torch import load_file

    together(2, heads_of, tmp_path, first, second)
    one, two, ppo = (load_file(tmp_path / name / "export" / "trlx_heads.safetensors") for name in ("one", "two", "ppo"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert ppo.keys() == {name for name in one if name.startswith("value.")} != one.keys()
    assert all(torch.equal(one[name], ppo[name]) for name in ppo)


def reward_models_of(folder, first: str, second: str) -> None:
    """What one backend learnt from a language model, what the other starts from, and its own start."""
    layout = {"Accelerate": {}, "NeMo": {"tensor_model_parallel_size": 2}}
    steps = ((second, "start", "causal", 0), (first, "one", "causal", 3), (second, "two", "one/export", 0))
    for trainer, name, source, total in steps:
        train = {"trainer": f"{trainer}RewardTrainer", "trainer_kwargs": layout[trainer], "total_steps": total}
        tokenizer = {"tokenizer_path": char_tokenizer(pad_is_eos=True)}
        model = {"model_path": str(folder / source)}
        made = run("Reward", folder / name, model=model, tokenizer=tokenizer, train=train)
        made.save_pretrained(folder / name / "export")
        (folder / name / "scores").write_text(json.dumps([row[2:] for row in made.evaluator.run().rows]))


@pytest.mark.parametrize(("first", "second"), [("Accelerate", "NeMo"), ("NeMo", "Accelerate")])
def test_a_reward_model_begins_alike_and_what_is_saved_scores_alike_everywhere(tmp_path, first, second):
    AutoModelForCausalLM.from_config(tiny_gpt2_config(initializer_range=0.2)).save_pretrained(tmp_path / "causal")
    together(2, reward_models_of, tmp_path, first, second)
    assert metrics(tmp_path / "start")[0] == pytest.approx(metrics(tmp_path / "one")[0], abs=1e-5)
    learnt, loaded = (json.loads((tmp_path / name / "scores").read_text()) for name in ("one", "two"))
    flat, expected = (
        [sample["prompt"] + sample[side] for sample in WITH_MARGIN[:3] for side in ("chosen", "rejected")],
        sum(learnt, []),
    )
    assert max(expected) - min(expected) > 0.1
    assert sum(loaded, []) == pytest.approx(expected, abs=1e-5)
    assert scores_of(tmp_path / "one" / "export", flat) == pytest.approx(expected, abs=1e-5)
    assert SequenceClassifierReward(str(tmp_path / "one" / "export"))(samples=flat) == pytest.approx(expected, abs=1e-5)


def scored_on_each_rank(folder) -> None:
    """Two data ranks of two processes; each process would give another reward."""
    import os

    import trlx

    rank = int(os.environ["RANK"])

    def reward_fn(samples, **kwargs):
        return [float(rank)] * len(samples)

    train = {
        "trainer": "NeMoPPOTrainer",
        "trainer_kwargs": {"pipeline_model_parallel_size": 2},
        "reward_on": "each_rank",
        "batch_size": 4,
        "total_steps": 2,
    }
    config = tiny_config(folder, "PPO", model=NO_DROPOUT, train=train)
    trainer = trlx.train(config=config, **DATA["PPO"] | {"reward_fn": reward_fn})
    assert trainer.backend.leads is (rank in (0, 1))


def test_rewards_are_asked_of_one_process_of_each_data_rank(tmp_path):
    together(4, scored_on_each_rank, tmp_path)
    step = next(line for line in metrics(tmp_path) if "rollout_scores/mean" in line)
    # the first stages are ranks 0 and 1, with half of the rollouts each
    assert step["rollout_scores/mean"] == 0.5


def stopped_from_the_side(folder) -> None:
    """A signal reaches the process that holds the second half of the layers."""
    import os
    import signal

    from trlx.trainer.sft import SFTTrainer

    train = {"trainer": "NeMoSFTTrainer", "trainer_kwargs": {"pipeline_model_parallel_size": 2}, "total_steps": 8}
    original = SFTTrainer.after_step

    def after_step(self, found):
        if self.schedule.step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, found)

    SFTTrainer.after_step = after_step
    with pytest.raises(SystemExit) as stopped:
        run("SFT", folder, model=NO_DROPOUT, train=train)
    assert stopped.value.code == 75


def test_a_signal_to_any_process_saves_and_stops_all(tmp_path):
    together(2, stopped_from_the_side, tmp_path)
    assert newest(tmp_path).name == "checkpoint_3"


def refused_at_construction(folder) -> None:
    """Settings that are wrong anywhere, or that this backend cannot do, before anything is sampled."""
    from trlx.api import trainers
    from trlx.backends.megatron.nemo.file import read_megatron_cfg

    sizes = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2, "kv_channels": 4}
    described = {"megatron_cfg": {"model": read_megatron_cfg("megatron_2b")["model"] | sizes}}
    unlike_any = {"model": {"model_path": "described"}, "train": {"trainer_kwargs": described}}

    def build(algorithm: str, **changes):
        config = tiny_config(folder, algorithm, **changes)
        trainers.get(f"NeMo{algorithm}Trainer")(config, DATA[algorithm].get("reward_fn"), **config.train.trainer_kwargs)

    for algorithm, changes, words in (
        ("PPO", {"method": {"gen_kwargs": {"topk": 1}}}, "Unknown key 'method.gen_kwargs.topk'. Did you mean 'top_k'"),
        ("PPO", {"method": {"gen_kwargs": {"temperature": 0}}}, "asks for the likeliest token always"),
        (
            "PPO",
            {"method": {"gen_experience_kwargs": {"max_new_tokens": 6, "guidance_scale": 1.5}}},
            "guidance_scale does not work",
        ),
        ("SFT", {"method": {"gen_kwargs": {"num_beams": 2}}}, "gen_kwargs.num_beams does not work with a NeMo"),
        ("SFT", {"method": {"gen_kwargs": {"beta": 1}}}, "gen_kwargs.beta is 1, but only ILQL has the Q heads"),
        (
            "ILQL",
            {"train": {"trainer_kwargs": {"logit_mask": [[True]]}}},
            r"shape \[1, 1\], but the model has 38 tokens",
        ),
        ("SFT", {"train": {"trainer_kwargs": {"tensor_parallel": 2}}}, "Did you mean 'tensor_model_parallel_size'"),
        ("SFT", {"model": {"num_layers_unfrozen": 3}}, "num_layers_unfrozen is 3, but the model has 2 blocks"),
        ("SFT", {"model": {"model_path": T5Config()}}, "does not support the architecture 't5'"),
        ("SFT", {"optimizer": {"kwargs": {"learning_rate": 1.0}}}, "write optimizer.kwargs.lr instead"),
        ("Reward", {"model": {"peft_config": {"peft_type": "LORA", "r": 2}}}, "model.peft_config asks for an adapter"),
        ("Reward", unlike_any, "A reward model needs an architecture of transformers, and this model fits none"),
    ):
        with pytest.raises(ValueError, match=words):
            build(algorithm, **changes)


def test_settings_that_cannot_work_are_refused_before_anything_is_sampled(tmp_path):
    together(1, refused_at_construction, tmp_path)
