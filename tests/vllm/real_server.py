"""PPO on random walks with real vLLM servers: run by server.sh, which makes their environment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx2
import pytest
from tenacity import Retrying, stop_after_delay, wait_fixed
from transformers import LlamaConfig

import trlx
from tests.runs import metrics
from trlx.launch.demo.task import RandomWalks
from trlx.launch.demo.tokenizer import letter_tokenizer
from trlx.launch.vllm import command
from trlx.sampling.settings import SamplingConfig

pytestmark = [
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="tests/vllm/server.sh names an environment with vLLM"),
    pytest.mark.timeout(900),
]

BLOCK = 32
"""Tokens of a block of vLLM's prefix cache on CPUs."""
ON_CPUS = ["--enforce-eager", "--block-size", str(BLOCK)]
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
WALKS = RandomWalks()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A Llama that imitates random walks. On CPUs vLLM needs heads of 32 numbers."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = letter_tokenizer(WALKS.letters)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    llama = LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends, pad_token_id=tokenizer.pad_token_id)
    config = (
        trlx.load_preset("sft")
        .evolve(
            model={"model_path": llama},
            tokenizer={"tokenizer_path": tokenizer},
            optimizer={"kwargs": {"lr": 3e-3}},
            method={"gen_kwargs": {"max_new_tokens": 9}},
            train={"total_steps": 150, "batch_size": 100, "seq_length": 11, "eval_interval": 150, "tracker": None},
        )
        .evolve(train={"checkpoint_dir": str(folder / "run")})
    )
    trlx.train(samples=[[walk[0], walk[1:]] for walk in WALKS.walks], config=config).save_pretrained(folder / "hf")
    return folder / "hf"


def config_of(model: Path, folder: Path, port: int, **changes) -> trlx.TRLConfig:
    sampler = {"engine": "vllm", "url": f"http://127.0.0.1:{port}", "patience": 300, **changes.pop("sampler", {})}
    train = {"sampler": sampler, **changes.pop("train", {})}
    preset = trlx.load_preset("randomwalks").evolve(
        model={"model_path": str(model)},
        tokenizer={"tokenizer_path": str(model)},
        optimizer={"kwargs": {"lr": 3e-4}},
        method={"num_rollouts": 64, "chunk_size": 64},
        train={"batch_size": 64, "total_steps": 16, "eval_interval": 4, "checkpoint_dir": str(folder)},
    )
    return preset.evolve(train=train, **changes)


class Running:
    """A server that `trlx vllm` starts."""

    def __init__(self, model: Path, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        asked = command(config_of(model, log, self.port), os.environ["VLLM_PYTHON"])
        # a prompt longer than a block of the cache has to fit
        self.words = [*asked.words, *ON_CPUS, "--max-model-len", "128"]
        self.variables = {**os.environ, **asked.variables, **VARIABLES}
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.words, env=self.variables, stdout=log, stderr=log, cwd=self.log.parent, start_new_session=True
            )

    def wait(self) -> None:
        url = f"http://127.0.0.1:{self.port}/health"
        Retrying(stop=stop_after_delay(300), wait=wait_fixed(1))(lambda: httpx2.get(url).raise_for_status())

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def server(model, tmp_path_factory):
    running = Running(model, tmp_path_factory.mktemp("server") / "log.txt")
    running.wait()
    yield running
    running.kill()


class GreedyIsThePolicys(trlx.Callback):
    """Compares the server's likeliest tokens with those of the model that trains, at every evaluation."""

    def __init__(self):
        self.compared = 0

    def on_evaluation(self, trainer, metrics):
        letters = len(WALKS.letters)
        # two share a block, one is shorter
        prompts = [[(7 * i) % letters for i in range(n)] for n in (BLOCK + 8, 2 * BLOCK + 3, 5)]
        greedy = SamplingConfig(max_new_tokens=12, do_sample=False, eos_token_id=trainer.tokenizer.eos_token_id)
        own = trainer.backend.sampler().generate(prompts, greedy)
        served = trainer.draw(prompts, greedy)
        assert [sample.ids for sample in served] == [sample.ids for sample in own]
        self.compared += 1


def gaps(folder: Path) -> list[float]:
    return [line["rollouts/logprob_gap/max"] for line in metrics(folder) if "rollouts/logprob_gap/max" in line]


def learn(config, *callbacks):
    return trlx.train(
        reward_fn=WALKS.reward_fn,
        metric_fn=WALKS.metric_fn,
        prompts=WALKS.prompts * 4,
        eval_prompts=WALKS.prompts,
        config=config,
        callbacks=list(callbacks),
    )


def test_ppo_learns_from_a_server_that_has_every_new_policy(model, server, tmp_path):
    same = GreedyIsThePolicys()
    learn(config_of(model, tmp_path, server.port, train={"total_steps": 40}), same)
    lines = metrics(tmp_path)
    assert same.compared == 11
    assert len(gaps(tmp_path)) == 20
    assert max(gaps(tmp_path)) < 1e-4
    rewards = [line["reward/mean"] for line in lines if "reward/mean" in line]
    assert rewards[-1] > rewards[0] + 0.15


def test_one_seed_gives_one_run(model, server, tmp_path):
    for folder in ("a", "b"):
        learn(config_of(model, tmp_path / folder, server.port, train={"total_steps": 4}))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_collections_that_are_sampled_ahead_are_corrected(model, server, tmp_path):
    changes = {"train": {"rollouts_ahead": 1, "total_steps": 8}, "method": {"importance_cap": 2.0}}
    learn(config_of(model, tmp_path, server.port, **changes))
    lines = [line for line in metrics(tmp_path) if "rollouts/importance/max" in line]
    assert len(lines) == 4
    assert lines[0]["rollouts/importance/max"] == pytest.approx(1, abs=1e-4)
    assert min(line["rollouts/importance/max"] for line in lines[1:]) > 1.01


def test_weights_travel_through_a_folder(model, server, tmp_path):
    sampler = {"transport": "folder", "folder": str(tmp_path / "weights")}
    learn(
        config_of(model, tmp_path / "run", server.port, sampler=sampler, train={"total_steps": 6}), GreedyIsThePolicys()
    )
    assert max(gaps(tmp_path / "run")) < 1e-4


def test_a_server_that_is_killed_and_started_again_gets_the_weights_again(model, server, tmp_path):
    class Killing(trlx.Callback):
        def on_step(self, trainer, metrics):
            if trainer.schedule.step == 6:
                server.kill()
                server.start()

    learn(config_of(model, tmp_path, server.port, train={"total_steps": 12}), Killing(), GreedyIsThePolicys())
    assert len(gaps(tmp_path)) == 6
    assert max(gaps(tmp_path)) < 1e-4
