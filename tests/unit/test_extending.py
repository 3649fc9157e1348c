"""The page about methods of one's own: its code runs as printed."""

import importlib
import json
import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.builders import VOCABULARY, char_tokenizer, tiny_gpt2
from tests.runs import PROMPTS, share_of_a, tiny_config
from trlx.config import TRLConfig
from trlx.data.store import shard
from trlx.methods.units import Unit
from trlx.registry import trackers
from trlx.tracking import Tracker

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


@pytest.fixture
def printed(tmp_path, monkeypatch) -> Path:
    """A folder with every file of the page, and a "gpt2" that gives each token of `char_tokenizer` one probability."""
    for name, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(text)
    model = tiny_gpt2()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "gpt2")
    char_tokenizer().save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def logged(folder: Path) -> list[dict[str, float]]:
    """What every step logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


LOG = math.log(VOCABULARY)
"""Minus the log-probability of any token under the model of `printed`, before it has learnt."""


def test_a_loss_over_pairs_is_divided_by_pairs(printed):
    # every token is as likely as any other, so no answer is ahead: -log sigmoid(-0.5), whatever the lengths are.
    # three pairs in batches of two: of the second batch one half only fills it up
    trainer = runpy.run_path(str(printed / "train.py"))["trainer"]
    first, second, *_, last = logged(printed / "ckpts" / "simpo")
    assert first["loss"] == pytest.approx(math.log(1 + math.e**0.5), abs=1e-5)
    assert last["accuracy"] == 1 and last["loss"] < second["loss"]
    assert trainer.schedule.step == 20 and (printed / "simpo-model" / "model.safetensors").is_file()


def test_a_callback_adds_a_number_and_may_end_the_run(printed):
    page = runpy.run_path(str(printed / "callbacks.py"))
    lengths = [line for line in page["trainer"].history if "rollouts/response_length" in line]
    assert page["trainer"].schedule.step == 4 and len(lengths) == 1  # four passes over one collection
    assert lengths[0]["length_left"] == 100 - lengths[0]["rollouts/response_length"]
    said = []
    strict, metrics = page["LengthLimit"](3), {"rollouts/response_length": 3.5}
    strict.on_step(SimpleNamespace(stop=said.append), metrics)
    assert said == ["responses have more than 3 tokens"] and metrics["length_left"] == -0.5


def test_a_pair_is_never_split(printed):
    importlib.import_module("simpo")
    from trlx.registry import trainers

    config = TRLConfig.load_yaml(printed / "simpo.yaml", overrides=["train.minibatch_size=1"])
    with pytest.raises(ValueError, match="train.minibatch_size is 1, but this trainer keeps 2 rows together"):
        trainers.get("AccelerateSimPOTrainer")(config)
    trainer = trainers.get("AccelerateSimPOTrainer")(TRLConfig.load_yaml(printed / "simpo.yaml"))
    trainer.make_experience([{"prompt": p, "chosen": p * 2, "rejected": p * 3} for p in "abcdefg"], 64)
    rows = [trainer.schedule.rows(14)]
    while not trainer.schedule.advance(14):
        rows.append(trainer.schedule.rows(14))
    assert [len(batch) for batch in rows] == [4, 4, 4, 2] and sorted(sum(rows, [])) == list(range(14))
    assert all(
        one % 2 == 0 and other == one + 1 for batch in rows for one, other in zip(batch[::2], batch[1::2], strict=True)
    )
    assert sum(rows, []) != list(range(14))
    with pytest.raises(ValueError, match="There are 13 rows, but 2 stay together"):
        trainer.schedule.rows(13)
    # two processes share 14 rows as 8 and 6, of which two more rows fill up the second
    first, second = (shard(trainer.samples, list(range(14)), rank, 2, together=2) for rank in (0, 1))
    assert (len(first), len(second)) == (8, 8)
    assert [int(Unit.PAIR.count(batch)) for batch in (first, second)] == [4, 3]
    # and of the six rows that are left behind a batch of eight the first takes four
    trainer.backend.data_size = trainer.schedule.data_size = 2
    trainer.schedule.rows_done = 8
    taken = []
    for trainer.backend.data_rank in (0, 1):
        taken.append(int(trainer._next_batch().response_mask.any(dim=1).sum()))
    assert taken == [4, 2]


def test_samples_of_a_prompt_are_compared_with_each_other(printed, monkeypatch):
    import trlx

    rloo, scores = importlib.import_module("rloo"), {}
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; the other group is alike
    found = rloo.leave_one_out(torch.tensor([1.0, 5, 2, 5, 6]), torch.tensor([0, 1, 0, 1, 0]))
    assert found.tolist() == [-3, 0, -1.5, 0, 4.5]

    def reward_fn(outputs, prompts, step, **kwargs):
        found = [float(output.count("a")) for output in outputs]
        scores.setdefault(step, []).extend(zip(prompts, found, strict=True))
        return found

    method = {"name": "LeaveOneOutConfig", "num_rollouts": 6, "samples_per_prompt": 3, "chunk_size": 2}
    train = {"trainer": "AccelerateLeaveOneOutTrainer", "total_steps": 1, "batch_size": 3, "epochs": 1}
    settings = tiny_config(printed / "out", "PPO", train=train).to_dict()
    settings["method"] = {**method, "gen_kwargs": {"max_new_tokens": 6, "temperature": 0.5}}
    config = TRLConfig.from_dict(settings)
    trainer = trlx.train(reward_fn=reward_fn, prompts=PROMPTS, eval_prompts=["a"], config=config)
    with monkeypatch.context() as forgotten, pytest.raises(TypeError, match="advantages must return a TokenBatch"):
        forgotten.setattr(type(trainer), "advantages", lambda self, batch: None)
        trainer.collect()
    batch, sizes = trainer.store, []
    generate = trainer.sampler.generate
    trainer.sampler.generate = lambda prompts, sampling: sizes.append(len(prompts)) or generate(prompts, sampling)
    trainer.collect()
    assert sizes == [2, 1, 2, 1]  # a group of three in draws of at most method.chunk_size
    assert batch.group.tolist() == [0, 0, 0, 1, 1, 1] and batch.old_values is None and batch.ref_logprobs is None
    prompts = [ids[~mask][:1].tolist() for ids, mask in zip(batch.tokens, batch.response_mask, strict=True)]
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3] == prompts[4] == prompts[5]
    sums = batch.scores.sum(dim=1)
    for row in range(6):
        others = [sums[other] for other in range(6) if other != row and batch.group[other] == batch.group[row]]
        advantage = float(sums[row] - sum(others) / 2)
        assert batch.advantages[row][batch.response_mask[row]].tolist() == pytest.approx(
            [advantage] * int(batch.response_mask[row].sum()), abs=1e-5
        )


def test_a_sampler_that_is_registered_draws_the_rollouts_and_its_log_probabilities_are_compared(printed):
    import trlx

    importlib.import_module("recorded")
    answers = {(4,): [5, 6, 2], (5,): [7, 2]}  # "a" and "b"
    lines = [{"prompt": list(p), "ids": ids, "logprobs": [-1.0] * len(ids)} for p, ids in answers.items()]
    Path("answers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = tiny_config(
        printed / "out",
        "PPO",
        model={"model_path": "gpt2"},
        tokenizer={"tokenizer_path": None},
        method={"num_rollouts": 4, "ppo_epochs": 1},
        train={"sampler": {"engine": "recorded", "path": "answers.jsonl"}, "total_steps": 1},
    )
    trainer = trlx.train(reward_fn=share_of_a, prompts=["a", "b"], config=config)
    assert trainer.sampler.version == 1
    line = logged(printed / "out")[0]
    assert line["rollouts/logprob_gap/mean"] == pytest.approx(LOG - 1, abs=1e-5)
    assert line["rollouts/response_length"] == 2.5


def test_a_sampler_that_nobody_knows_or_an_argument_that_it_does_not_take_is_refused(tmp_path):
    from trlx.registry import trainers

    for sampler, words in (
        ("recoded", "Unknown sampler 'recoded'"),
        ({"engine": "auto", "url": "x"}, "train.sampler.url"),
        ({"url": "x"}, "Unknown key 'train.sampler.url'. Known: places"),
        ({"engine": 3}, "train.sampler must be auto, a sampler's name, or a dict with engine"),
    ):
        with pytest.raises(ValueError, match=words):
            config = tiny_config(tmp_path, "SFT", train={"sampler": sampler})
            trainers.get(config.train.trainer)(config)
    kinds = {}
    for name in ("transformers", "generate", "loop", "auto"):
        config = tiny_config(tmp_path, "SFT", train={"sampler": name})
        kinds[name] = type(trainers.get(config.train.trainer)(config).sampler)
    assert kinds["transformers"] is kinds["generate"] is not kinds["auto"] is kinds["loop"]


def test_a_model_whose_activations_wait_on_the_host_trains_as_any_other(printed, monkeypatch):
    import trlx

    importlib.import_module("offloaded")
    weights, moved = [], []
    own = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda **given: (moved.append(given), own(**given))[1])
    for kind in ("causal", "offloaded"):
        assert not moved
        model, train = {"model_arch_type": kind}, {"total_steps": 4, "batch_size": 4}
        config = tiny_config(printed / kind, "PPO", model=model, train=train)
        trainer = trlx.train(reward_fn=share_of_a, prompts=["ab"], config=config)
        weights.append(dict(trainer.backend.policy.state_dict()))
    assert moved and moved[0] == {"pin_memory": False}
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_the_changed_ppo_adds_its_term_and_the_own_pipeline_its_words(printed):
    import trlx

    importlib.import_module("ppo_kl")
    importlib.import_module("polite")
    seen = []

    def reward_fn(prompts, outputs, **kwargs):
        seen.extend(prompts)
        return [ord(output[:1] or "a") / 10 for output in outputs]

    names = {"trainer": "AcceleratePPOWithKLTrainer", "pipeline": "PolitePipeline"}
    config = tiny_config(
        printed / "out",
        "PPO",
        method={"name": "PPOWithKLConfig", "kl_loss_coef": 0.5, "ppo_epochs": 1},
        train={**names, "total_steps": 2, "seq_length": 30},
    )
    trainer = trlx.train(reward_fn=reward_fn, prompts=PROMPTS, config=config)
    first, second = logged(printed / "out")
    assert first["losses/kl"] == pytest.approx(0, abs=1e-5)
    assert second["losses/kl"] > 1e-5
    assert trainer.method.kl_loss_coef == 0.5
    assert set(seen) == {f"please: {prompt}" for prompt in PROMPTS}


def test_a_tracker_of_ones_own_goes_on_after_a_resume(printed, monkeypatch):
    monkeypatch.setattr(trackers, "_classes", {})
    runpy.run_path(str(printed / "spreadsheet.py"))
    with Tracker("spreadsheet", "run") as tracker:
        tracker.log({"loss": 0.5, "kl": 0.25}, 1)
        state = tracker.state()
        tracker.log({"loss": 9.0}, 2)
    with Tracker("spreadsheet", "run", state=state) as tracker:
        tracker.log({"loss": 0.125}, 2)
    assert Path("run/metrics.csv").read_text() == "1,loss,0.5\n1,kl,0.25\n2,loss,0.125\n"
