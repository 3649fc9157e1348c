"""Sampling from vLLM servers, with a stand-in for the server: see `tests.vllm_server`; tests/vllm asks a real one."""

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import trlx
from tests.builders import char_tokenizer, tiny_gpt2
from tests.runs import PROMPTS, metrics, run, share_of_a, tiny_config
from tests.vllm_server import BLOCK, StandIn
from trlx.backends.vllm import channel
from trlx.backends.vllm import sampler as vllm
from trlx.backends.vllm import server as http
from trlx.backends.vllm.channel import chunks
from trlx.backends.vllm.server import ServerError
from trlx.models.adapters import _merged
from trlx.sampling.settings import SamplingConfig
from trlx.trainer.ppo import PPOTrainer

GREEDY = SamplingConfig(max_new_tokens=5, do_sample=False, eos_token_id=2)


@pytest.fixture
def start(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
    running = []

    def start(seed=9, **described):
        # the weights of another seed than the policy's: no sample of the first collection may come from them
        running.append(StandIn(tiny_gpt2(seed=seed), char_tokenizer(), **described))
        return running[-1]

    yield start
    for each in running:
        each.close()


def trained(folder, *servers, algorithm="PPO", method=None, model=None, patience=20, **train):
    sampler = {"engine": "vllm", "url": [server.url for server in servers], "patience": patience}
    sampler |= train.pop("sampler", {})
    settings = {"total_steps": 6, "sampler": sampler, **train}
    return run(
        algorithm, folder, train=settings, method={"ppo_epochs": 1} if method is None else method, model=model or {}
    )


def ahead(folder, server, **train):
    method = {"ppo_epochs": 2, "importance_cap": 1.5, "num_rollouts": 8}
    return trained(folder, server, method=method, rollouts_ahead=1, **train)


def test_after_every_update_the_server_draws_from_the_new_policy(tmp_path, start):
    server = start()
    trainer = trained(tmp_path, server)
    lines = metrics(tmp_path)
    gaps = [line["rollouts/logprob_gap/max"] for line in lines if "rollouts/logprob_gap/max" in line]
    assert len(gaps) == 3
    assert max(gaps) < 1e-5
    assert max(line.get("policy/ratio_deviation/max", 0) for line in lines) > 0.01  # the policy did change
    # Python waits for all other threads before it ends
    assert {thread.daemon for thread in threading.enumerate() if thread.name.startswith("trlx-vllm")} == {True}
    # three collections, evaluations at 0, 4 and the end: versions 0, 2, 4 and 6
    assert server.calls.count("/finish_weight_update") == 4
    last = [call for call in server.calls if call not in ("/v1/completions", "/collective_rpc", "/update_weights")][-5:]
    assert last == ["/pause", "/start_weight_update", "/finish_weight_update", "/reset_prefix_cache", "/resume"]
    own, prompts = trainer.backend.sampler(), [[4] * (BLOCK + 2), [5, 6], [7] * BLOCK]
    assert [s.ids for s in trainer.sampler.generate(prompts, GREEDY)] == [s.ids for s in own.generate(prompts, GREEDY)]
    assert {sample.version for sample in trainer.sampler.generate(prompts, GREEDY)} == {6}
    assert trainer.sampler.generate([[4]], SamplingConfig(max_new_tokens=3))[0].logprobs is not None
    shaped = {"top_k": 3}, {"top_p": 0.9}, {"extra": {"repetition_penalty": 1.2}}, {"do_sample": False}
    for changes in shaped:  # draws from another distribution than the policy's
        assert trainer.sampler.generate([[4]], SamplingConfig(max_new_tokens=3, **changes))[0].logprobs is None


def test_the_states_of_old_weights_are_forgotten(tmp_path, start, monkeypatch):
    """The stand-in answers a prompt of a block with old weights unless it is told: this test sees that it is."""
    server, long = start(), {"prompts": ["abcdef", "fedcba"], "reward_fn": share_of_a}
    config = tiny_config(tmp_path, "PPO", train={"total_steps": 4, "sampler": {"engine": "vllm", "url": server.url}})
    trlx.train(config=config, **long)
    assert max(line.get("rollouts/logprob_gap/max", 0) for line in metrics(tmp_path)) < 1e-5
    monkeypatch.setattr(StandIn, "reset_prefix_cache", lambda *_: {"success": True})
    trlx.train(config=config.evolve(train={"checkpoint_dir": str(tmp_path / "stale")}), **long)
    assert max(line.get("rollouts/logprob_gap/max", 0) for line in metrics(tmp_path / "stale")) > 0.01


def test_a_seed_gives_one_run_and_groups_are_asked_for_at_once(tmp_path, start):
    servers = start(), start(seed=3)
    method = {"num_rollouts": 16, "chunk_size": 8}
    for folder in ("a", "b"):
        trained(tmp_path / folder, *servers, algorithm="GRPO", method=method, total_steps=4)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    rollouts = [[body for body in server.asked if body["n"] == 4] for server in servers]
    assert len(rollouts[0]) == len(rollouts[1]) == 4  # 2 runs x 1 collection x 4 groups, shared by two servers
    seeds = [body["seed"] for server in servers for body in server.asked]
    assert len({*seeds}) == len(seeds) / 2


def test_a_request_says_how_to_sample(tmp_path, start):
    server = start()
    gen_kwargs = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.2}
    config = tiny_config(
        tmp_path,
        "PPO",
        method={"gen_kwargs": gen_kwargs | {"min_new_tokens": 1}},
        train={"total_steps": 1, "sampler": {"engine": "vllm", "url": server.url}},
    )
    trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config, stop_sequences=["!"])
    asked = server.asked[-1] | {"prompt": None, "seed": None, "model": None, "n": None}
    assert {name: value for name, value in asked.items() if value is not None} == {
        "max_tokens": 3,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "stop_token_ids": [2],
        "stop": ["!"],
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
    }
    assert not any("logprob_gap/mean" in name for line in metrics(tmp_path) for name in line)


@pytest.mark.parametrize(
    "failures",
    [[(503, {})], [(429, {})] * 3, [(200, {"choices": []})], [(200, {"choices": [{"finish_reason": "abort"}]})]],
    ids=["error", "busy", "fewer", "aborted"],
)
def test_a_server_that_fails_is_asked_again(tmp_path, start, failures, caplog):
    server, sound = start(), start()
    server.failures += failures
    trained(tmp_path / "a", server, total_steps=2)
    assert sum("it is asked again for up to 20 seconds" in record.message for record in caplog.records) == 1
    trained(tmp_path / "b", sound, total_steps=2)
    assert not server.failures
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_server_that_was_started_again_gets_the_weights_again(tmp_path, start):
    server, sound = start(), start()
    sample, samples = server.sample, []

    def restarting(body, seed):
        samples.append(seed)
        if len(samples) == 30:  # in the middle of a collection; what it draws now comes from the first weights
            server.boot()
        return sample(body, seed)

    server.sample = restarting
    trained(tmp_path / "a", server)
    trained(tmp_path / "b", sound)
    gaps = [line.get("rollouts/logprob_gap/max", 0) for line in metrics(tmp_path / "a")]
    assert max(gaps) < 1e-5
    assert server.calls.count("/init_weight_transfer_engine") == 2
    assert server.calls.count("/finish_weight_update") == sound.calls.count("/finish_weight_update") + 1


@pytest.mark.parametrize("end", ["patience", "ahead", "Ctrl-C", "Ctrl-C ahead"])
def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(tmp_path, start, end):
    server, pressed = start(), []
    refuse = server.v1_completions

    def leaving(body, query):
        if len(server.asked) > 20:
            server.failures += [(503, {"error": "no worker"})] * 3
        if len(server.asked) > 60 and not pressed and "Ctrl-C" in end:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
        return refuse(body, query)

    server.v1_completions = leaving
    train = {"sampler": {"engine": "vllm", "url": server.url, "patience": 1000 if "Ctrl-C" in end else 0.05}}
    train |= {"checkpoint_interval": 100, "eval_interval": 100, "rollouts_ahead": int("ahead" in end)}
    method = {"ppo_epochs": 1} | ({"importance_cap": 1.5} if "ahead" in end else {})
    config = tiny_config(tmp_path, "PPO", method=method, train=train)
    with pytest.raises(KeyboardInterrupt if "Ctrl-C" in end else ServerError):
        trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config)
    server.failures.clear()
    server.v1_completions = refuse
    done = max(line["step"] for line in metrics(tmp_path))
    assert done > 0 and (tmp_path / f"checkpoint_{done}").is_dir()
    config = config.evolve(train={"resume_from_checkpoint": "auto", "sampler": {"patience": 20}})
    assert trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config).schedule.step == 8


def test_weights_that_do_not_arrive_are_sent_again(tmp_path, start, monkeypatch):
    server, lost = start(), []
    monkeypatch.setattr(channel, "LONGEST_MEETING", 1)
    receive = server.update_weights

    def failing(body, query):
        if not lost:
            lost.append(True)
            raise RuntimeError("out of memory")
        return receive(body, query)

    server.update_weights = failing
    answers = [{"success": False}, {}]  # to the second request to forget the states of old weights, and the first
    forget = server.reset_prefix_cache
    server.reset_prefix_cache = lambda *_: answers.pop() if answers else forget(*_)
    trained(tmp_path, server, total_steps=2)
    assert max(line.get("rollouts/logprob_gap/max", 0) for line in metrics(tmp_path)) < 1e-5
    assert not answers and server.calls.count("/finish_weight_update") == 5  # of the two failures, and 3 versions
    server.update_weights = None
    with pytest.raises(ServerError, match="The weights of step 0 did not reach the vLLM servers: .*404"):
        trained(tmp_path / "never", server, patience=0.05)


def test_weights_can_travel_through_a_folder(tmp_path, start, monkeypatch):
    server, folder = start(), tmp_path / "weights"
    monkeypatch.setattr(vllm, "chunks", partial(chunks, limit=9000))
    folder.mkdir()
    save_file({"of an older run": torch.ones(1)}, folder / "z.safetensors")
    sampler = {"transport": "folder", "folder": str(folder)}
    trainer = trained(tmp_path / "run", server, sampler=sampler, model={"num_layers_unfrozen": 1})
    assert server.owner == trainer.sampler.owner is not None  # so that a second run is noticed
    assert [file.name for file in sorted(folder.iterdir())][:2] == ["part-00000.safetensors", "part-00001.safetensors"]
    about = http.Description((), None, 1, 38, 64, "", "bfloat16", "cpu")
    channel.Folder(None, about, str(tmp_path), "me").send({"a": torch.ones(1), "b": torch.ones(1).int()})
    sent = load_file(tmp_path / "part-00000.safetensors")
    assert (sent["a"].dtype, sent["b"].dtype) == (torch.bfloat16, torch.int32)
    assert max(line.get("rollouts/logprob_gap/max", 0) for line in metrics(tmp_path / "run")) < 1e-5
    assert "/init_weight_transfer_engine" not in server.calls
    assert server.calls.index("/pause") < server.calls.index("/reset_prefix_cache") < server.calls.index("/resume")


def test_an_adapter_is_merged_on_its_way(tmp_path, start):
    targets = {"target_modules": ["c_attn", "c_proj"], "modules_to_save": ["ln_f"]}
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, **targets}
    trainer = trained(tmp_path, start(), model={"peft_config": lora})
    gaps = [line["rollouts/logprob_gap/max"] for line in metrics(tmp_path) if "rollouts/logprob_gap/max" in line]
    assert max(gaps) < 1e-5
    trainer.save_pretrained(tmp_path / "merged", merge=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    weights = [*trainer.backend.weights_by_name()]
    sent = dict(weights)
    assert len(weights) == len(sent) and sent.keys() == merged.keys()  # tied weights go once
    assert all(torch.equal(sent[name], merged[name]) for name in merged)
    with pytest.warns():  # peft's, of the tied layer
        on_tied = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="shares its weight with another layer"):
        list(_merged(on_tied.base_model.model, "", {}))


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "gives raw_logprobs, not processed_logprobs.*trlx vllm"),
        ({"vocab_size": 50}, "a model of 50 tokens, the policy has 38"),
        ({"max_model_len": 6}, r"reads 6 tokens \(--max-model-len\), too few for method.gen_kwargs.max_new_tokens 6"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_before_training(tmp_path, start, described, said):
    with pytest.raises(ServerError, match=said):
        trained(tmp_path, start(**described))


def test_what_servers_cannot_do_is_refused(tmp_path, start):
    server = start(max_model_len=8)
    with pytest.raises(ServerError, match="prompt of 3 tokens and method.gen_kwargs.max_new_tokens 6 are more than"):
        trained(tmp_path, server)
    with pytest.raises(ValueError, match="method.gen_kwargs.beta needs ILQL's Q heads"):
        trained(tmp_path, server, algorithm="ILQL", method={})
    gen_kwargs = {"max_new_tokens": 4, "no_repeat_ngram_size": 2}
    with pytest.raises(ValueError, match="no_repeat_ngram_size is not passed on to vLLM"):
        trained(tmp_path, server, method={"gen_kwargs": gen_kwargs})
    for wrong, said in (
        *(({"url": url}, "url must be an address") for url in ("h:8000", "http://h:80x0", "http://h:8/v1/", 8000)),
        ({"transport": "smoke"}, "train.sampler.transport must be one of auto, gloo, nccl, folder"),
        ({"transport": "folder"}, "belong together"),
    ):
        with pytest.raises(ValueError, match=said):
            trained(tmp_path, server, sampler=wrong)
    server.failures.append((400, {"error": "no such setting"}))
    with pytest.raises(ServerError, match=r"refuses /v1/completions \(status 400\).*no such setting"):
        trained(tmp_path, server, method={"gen_kwargs": {"max_new_tokens": 2}})
    server.collective_rpc = None
    with pytest.raises(ServerError, match="cannot follow a policy: start it with the command that `trlx vllm` prints"):
        trained(tmp_path, server, patience=0.05)
    server.get = lambda path: (200, b"<html>")
    with pytest.raises(ServerError, match="is no vLLM server: it answers /health with '<html>'"):
        trained(tmp_path, server)


def test_two_runs_do_not_share_a_server(tmp_path, start):
    server = start(dtype="bfloat16")
    first = trained(tmp_path / "a", server, total_steps=2)
    assert server.dtypes == {torch.bfloat16}
    second = trained(tmp_path / "b", server, total_steps=2)
    second.load(tmp_path / "a" / "checkpoint_2")  # other weights of the same step
    times = server.calls.count("/finish_weight_update")
    second.draw([[4]], GREEDY)
    assert server.calls.count("/finish_weight_update") == times + 1
    with pytest.raises(ServerError, match="Another run sends its weights"):
        first.sampler.generate([[4]], GREEDY)


def test_ahead_of_training_the_next_collection_is_drawn_and_its_advantages_weighted(tmp_path, start, monkeypatch):
    server, seen, estimated, versions = start(), [], [], []
    collect, advantages = PPOTrainer.collect, PPOTrainer.advantages
    monkeypatch.setattr(
        PPOTrainer,
        "advantages",
        lambda self, batch: estimated.append(advantages(self, batch)) or estimated[-1],
    )
    report = lambda _, rollouts: versions.append({rollout.version for rollout in rollouts})  # noqa: E731
    monkeypatch.setattr(PPOTrainer, "report", report)

    def watched(self):
        before = [each.version for each in self.sampler._begun]
        batch = collect(self)
        assert torch.equal(batch.returns, estimated[-1].returns)
        seen.append((self.schedule.step, before, dict(self.pending), len(self.sampler._begun)))
        return batch

    monkeypatch.setattr(PPOTrainer, "collect", watched)
    trainer = ahead(tmp_path, server, total_steps=12)
    # four steps a collection: the second collection was drawn from the weights of step 0, the third from those of 4
    assert [(step, {*versions}, begun) for step, versions, _, begun in seen] == [
        (0, set(), 8),
        (4, {0}, 8),
        (8, {4}, 0),
    ]
    stats = [pending for _, _, pending, _ in seen]
    assert stats[0]["rollouts/importance/max"] == pytest.approx(1, abs=1e-5)
    assert all(each["rollouts/importance/max"] > 1.001 for each in stats[1:])
    assert trainer.schedule.step == 12 and versions == [{0}, {0}, {4}]

    sampler, sampling = trainer.sampler, trainer.rollout_sampling
    sampler.begin([[4], [5, 6], [4]], sampling)
    (_, *rows), times = sampler.begun(), len(server.asked)
    assert sampler.finish([[5, 6]], replace(sampling, max_new_tokens=2))[0].version == 12  # not the 6 tokens of `rows`
    assert len(server.asked) == times + 1
    assert [sample.ids for sample in sampler.finish([[5, 6], [4], [4]], sampling)] == [rows[i][2] for i in (1, 0, 2)]
    assert len(server.asked) == times + 1
    sampler.begin([[4]], sampling)
    server.boot()  # what it has begun may come from its first weights
    sampler.finish([[4]], sampling)
    assert len(server.asked) == times + 3
    sampler.begin([[4]], sampling)
    sampler._begun[0] = replace(sampler._begun[0], wait=lambda: (_ for _ in ()).throw(ServerError("gone")))
    assert sampler.begun() == []  # a checkpoint can be written all the same


def test_advantages_are_multiplied_by_the_weights(tmp_path, start):
    config = tiny_config(
        tmp_path,
        "GRPO",
        method={"importance_cap": 1.5, "num_iterations": 1, "kl_coef": 0.0},
        train={"sampler": {"engine": "vllm", "url": start().url}, "total_steps": 2},
    )
    trainer = trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config)
    trainer.sampler.sync(99, trainer.backend.weights_by_name)  # the weights of step 2, called those of step 99
    drawn = trainer.sampler._ask

    def biased(rows, sampling, begun):
        samples = drawn(rows, sampling, begun)
        for sample in samples:
            sample.logprobs = [logprob - 0.25 for logprob in sample.logprobs]
        return samples

    trainer.sampler._ask = biased
    batch = trainer.collect()
    unweighted = trainer.advantages(batch).advantages
    assert unweighted.abs().max() > 0.1
    mask = batch.response_mask
    torch.testing.assert_close(
        batch.advantages[mask], unweighted[mask] * torch.tensor(0.25).exp(), rtol=1e-4, atol=1e-5
    )
    trainer.method.importance_cap = None
    batch = trainer.collect()
    assert torch.equal(batch.advantages, trainer.advantages(batch).advantages)
    trainer.method.importance_cap = 1.5
    for sample_kwargs, said in (({"top_k": 3}, "GRPO|importance_cap needs the log-probabilities of VLLMSampler"),):
        gen_kwargs = {"max_new_tokens": 6, **sample_kwargs}
        with pytest.raises(ValueError, match=said):
            trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config.evolve(method={"gen_kwargs": gen_kwargs}))


def test_a_run_that_samples_ahead_resumes_exactly(tmp_path, start):
    server = start()
    ahead(tmp_path / "whole", server, total_steps=8, checkpoint_interval=3)
    ahead(tmp_path / "cut", server, total_steps=8, checkpoint_interval=3, keep_checkpoints=9)
    for folder in (tmp_path / "cut").glob("checkpoint_[68]"):
        folder.rename(tmp_path / folder.name)
    server.boot()
    ahead(tmp_path / "cut", server, total_steps=8, checkpoint_interval=3, resume_from_checkpoint="auto")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
