"""The parts of sampling from vLLM servers, each by itself."""

import shlex
import time
from threading import Event
from types import SimpleNamespace

import httpx2
import pytest
import torch

import trlx
from tests.runs import run
from trlx.backends.vllm import server as http
from trlx.backends.vllm.channel import chunks
from trlx.backends.vllm.inside.trlx_vllm.wire import empty, packed
from trlx.backends.vllm.threads import Threads
from trlx.batch import Rollout
from trlx.data.collate import collate, drawn_logprobs
from trlx.launch.vllm import command
from trlx.methods.importance import importance_weights
from trlx.methods.masked import finish, pack


def test_importance_weights_are_those_worked_out_by_hand():
    policy = torch.tensor([[0.0, -1.0, -2.0, -1.0]])
    drawn = torch.tensor([[5.0, -1.0, -1.0, -3.0]])
    mask = torch.tensor([[False, True, True, True]])
    weights, found = importance_weights(policy, drawn, mask, cap=2.0)
    # ratios 1, e^-1, e^2
    assert weights.tolist() == [pytest.approx([1, 1, 0.36787944, 2])]
    stats = finish(*pack(found))
    assert stats["rollouts/sampler_kl"] == pytest.approx((0 + 0.36787944 - 1 + 1 + 7.38905610 - 1 - 2) / 3)
    assert stats["rollouts/importance/mean"] == pytest.approx((1 + 0.36787944 + 2) / 3)
    assert stats["rollouts/importance_capped"] == pytest.approx(1 / 3)
    assert [*finish(*pack(importance_weights(policy, drawn, mask, None)[1]))] == ["rollouts/sampler_kl"]


def test_an_eos_in_place_of_a_stop_sequence_has_no_weight():
    rollouts = [
        Rollout(prompt=[7, 8], response=[3, 4, 2], logprobs=[-1.0, -2.0]),
        Rollout(prompt=[7], response=[5, 2], logprobs=[-3.0, -4.0]),
        Rollout(prompt=[7], response=[5]),
    ]
    drawn, known = drawn_logprobs(rollouts, collate(rollouts, 0))
    assert drawn.tolist() == [[0, 0, -1, -2, 0], [0, -3, -4, 0, 0], [0] * 5]
    assert known.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0] * 5]


def test_chunks_are_whole_and_bytes_come_back_as_tensors():
    weights = [
        ("a", torch.arange(3.0)),
        ("b", torch.tensor([1, 2, 3], dtype=torch.int8)),
        ("c", torch.ones(2, 2).half()),
    ]
    assert [[*chunk] for chunk in chunks(iter(weights), 15)] == [["a", "b"], ["c"]]
    assert [[*chunk] for chunk in chunks(iter(weights), 1)] == [["a"], ["b"], ["c"]]
    tensors = [tensor for _, tensor in weights]
    buffer, views = empty([t.shape for t in tensors], ["float32", "int8", "float16"], "cpu")
    buffer.copy_(packed(tensors, "cpu"))
    assert all(
        torch.equal(view, tensor) and view.dtype == tensor.dtype for view, tensor in zip(views, tensors, strict=True)
    )


def test_a_silent_and_an_unreachable_server_are_asked_again(monkeypatch):
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.0)
    server, asked = http.Server("http://127.0.0.1:1", timeout=1, patience=60), []
    answers = [httpx2.ReadTimeout("slow"), httpx2.ConnectError("gone"), httpx2.Response(200, json={"choices": []})]

    def request(*_, **__):
        asked.append(answers.pop(0))
        if isinstance(asked[-1], Exception):
            raise asked[-1]
        return asked[-1]

    server.client = SimpleNamespace(request=request)
    assert server.complete({"n": 0}) == []
    assert len(asked) == 3
    answers.append(httpx2.ReadTimeout("slow"))  # what changes a server is sent once
    with pytest.raises(http.ServerError, match="/pause was silent too long at /pause"):
        server.control("pause")


def test_calls_that_have_not_begun_when_threads_are_closed_are_dropped():
    threads, may_end = Threads(1), Event()
    first = threads.submit(lambda: may_end.wait(10) and 1 / 0)
    while not threads._jobs.empty():
        time.sleep(0.001)
    second = threads.submit(print)
    threads.close()
    may_end.set()
    assert isinstance(first.exception(10), ZeroDivisionError)
    assert second.cancelled()
    threads.close()


def test_the_printed_command_is_of_the_server_that_fits_the_run(tmp_path):
    urls = ["http://127.0.0.1:8001", "http://node-2:8002"]
    config = trlx.load_preset("grpo").evolve(
        model={"model_path": "some/model"},
        tokenizer={"tokenizer_path": "some/tokenizer"},
        train={"sampler": {"engine": "vllm", "url": urls}, "seq_length": 96, "seed": 5, "mixed_precision": "bf16"},
    )
    words = shlex.split(str(command(config, "of/vllm/python", tensor_parallel=2)))
    assert words[0] == "VLLM_SERVER_DEV_MODE=1" and words[1].endswith("trlx/backends/vllm/inside")
    assert words[2:5] == ["of/vllm/python", "-m", "vllm.entrypoints.openai.api_server"]
    options = dict(zip(words[5::2], words[6::2], strict=True))
    assert options == {
        "--model": "some/model",
        "--tokenizer": "some/tokenizer",
        "--host": "127.0.0.1",
        "--port": "8001",
        "--dtype": "bfloat16",
        "--max-model-len": "96",
        "--tensor-parallel-size": "2",
        "--seed": "5",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--worker-extension-cls": "trlx_vllm.engine.Follower",
        "--weight-transfer-config": '{"backend": "trlx"}',
    }
    second = command(config, url="http://node-2:8002").words
    assert [second[second.index(name) + 1] for name in ("--host", "--port")] == ["node-2", "8002"]
    for precision, dtype in (("fp16", "float16"), ("no", "float32")):
        words = command(config.evolve(train={"mixed_precision": precision})).words
        assert words[words.index("--dtype") + 1] == dtype


def test_sampling_ahead_is_refused_where_it_does_nothing(tmp_path):
    for algorithm, given, said in (
        ("PPO", {"sampler": "vllm"}, "trains on samples of an older policy: set method.importance"),
        ("SFT", {}, "rollouts_ahead is for PPO and GRPO, not for SFTConfig"),
    ):
        with pytest.raises(ValueError, match=said):
            run(algorithm, tmp_path, train={"rollouts_ahead": 1, **given})
    with pytest.raises(ValueError, match="needs a sampler that works while the model trains"):
        run("PPO", tmp_path, method={"importance_cap": 2.0}, train={"rollouts_ahead": 1})
