"""Rewards from a classifier, and from a server over HTTP that is sometimes slow, broken or wrong."""

import json
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2ForSequenceClassification, GPT2LMHeadModel

import trlx
from tests.builders import char_tokenizer, tiny_gpt2_config
from tests.runs import PROMPTS, tiny_config
from trlx import RemoteReward, SequenceClassifierReward
from trlx.rewards.scoring import RewardError

SAMPLES = ["abc", "a", "abcdefgh", "hello, world", "b"]


def classifier(labels=1, **changes):
    """A decoder that classifies, with outputs far enough apart to see a difference."""
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(tiny_gpt2_config(num_labels=labels, **changes))
    torch.nn.init.normal_(model.score.weight)
    return model


def alone(model, text, tokenizer=None):
    """Logits [labels] of one text without any padding."""
    ids = (tokenizer or char_tokenizer())(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0]


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("pad", [{}, {"pad": False}])
def test_one_label_gives_its_logit_in_the_order_of_the_samples(size, pad):
    model = classifier(pad_token_id=None, attn_pdrop=0.5, embd_pdrop=0.5).train()
    expected = [float(alone(classifier(), sample)) for sample in SAMPLES]
    reward = SequenceClassifierReward(model, char_tokenizer(**pad), batch_size=size)
    state = torch.get_rng_state()  # which another thread draws rollouts from
    assert reward(samples=SAMPLES, prompts=SAMPLES, outputs=SAMPLES) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert reward(samples=SAMPLES) == pytest.approx(expected, abs=1e-5)
    assert reward(samples=[]) == [] and len(set(expected)) == 5


def test_similar_lengths_share_a_batch():
    model, shapes = classifier(), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    SequenceClassifierReward(model, char_tokenizer(), batch_size=2)(samples=SAMPLES)
    assert shapes == [(2, 12), (2, 3), (1, 1)]


@pytest.mark.parametrize("label", [2, "good"])
def test_several_labels_give_the_probability_of_the_one_asked_for(label):
    model = classifier(3, id2label={0: "bad", 1: "so", 2: "good"}, label2id={"bad": 0, "so": 1, "good": 2})
    expected = [float(alone(model, sample).softmax(dim=0)[2]) for sample in SAMPLES]
    scores = SequenceClassifierReward(model, char_tokenizer(), label=label)(samples=SAMPLES)
    assert scores == pytest.approx(expected, abs=1e-5)
    model.config.problem_type = "multi_label_classification"
    expected = [float(alone(model, sample).sigmoid()[2]) for sample in SAMPLES]
    scores = SequenceClassifierReward(model, char_tokenizer(), label=label)(samples=SAMPLES)
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "label", "words"),
    [
        (2, None, r"needs label=.*0 \('LABEL_0'\), 1 \('LABEL_1'\)"),
        (2, "good", r"has no label 'good'.*0 \('LABEL_0'\), 1 \('LABEL_1'\)"),
        (2, 2, "has no label 2"),
        (2, -1, "has no label -1"),
        (1, 0, "one label only"),
    ],
)
def test_a_wrong_label_is_refused_before_training(labels, label, words):
    with pytest.raises(ValueError, match=words):
        SequenceClassifierReward(classifier(labels), char_tokenizer(), label=label)


def test_a_language_model_is_not_scored_with_as_its_head_would_be_random(tmp_path):
    GPT2LMHeadModel(tiny_gpt2_config()).save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    reward = SequenceClassifierReward(str(tmp_path), label="LABEL_0")
    words = f"{tmp_path} is a language model, not a classifier .*'score.weight'.*: train one with config='reward'"
    with pytest.raises(ValueError, match=words):
        reward(samples=["ab"])


@pytest.mark.parametrize(("side", "kept"), [("left", "fgh"), ("right", "abc")])
def test_long_samples_are_cut_on_the_side_asked_for(side, kept):
    model = classifier()
    reward = SequenceClassifierReward(model, char_tokenizer(), max_length=3, truncation_side=side)
    assert reward(samples=["abcdefgh"]) == pytest.approx([float(alone(model, kept))], abs=1e-5)
    with pytest.raises(ValueError, match="truncation_side"):
        SequenceClassifierReward(model, char_tokenizer(), truncation_side="both")


def test_nothing_longer_than_the_model_can_read_reaches_it():
    model = classifier(n_positions=8)
    reward = SequenceClassifierReward(model, char_tokenizer())
    assert reward(samples=["ab" * 10]) == pytest.approx([float(alone(model, "ab" * 4))], abs=1e-5)


def test_the_eos_text_of_the_policy_is_not_judged_and_its_tokenizer_stays_as_it_was():
    policy, own = char_tokenizer(), char_tokenizer(pad=False)
    reward = SequenceClassifierReward(classifier(), char_tokenizer())
    ended, plain = reward(samples=["ab</s>"], tokenizer=policy), reward(samples=["ab"], tokenizer=policy)
    assert ended == plain != reward(samples=["ab</s>"])
    SequenceClassifierReward(classifier(), own)
    assert own.pad_token is None


def test_an_empty_sample_gets_a_score():
    model = classifier()
    scores = SequenceClassifierReward(model, char_tokenizer())(samples=["", "ab"])
    expected = [float(alone(model, "<pad>")), float(alone(model, "ab"))]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_an_encoder_reads_its_special_tokens_also_where_a_sample_is_cut():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=38,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=6,
        num_labels=1,
    )
    model, tokenizer = BertForSequenceClassification(config), char_tokenizer(adds_bos=True)
    scores = SequenceClassifierReward(model, tokenizer)(samples=["ab", "abcdefgh", "a"])
    expected = [float(alone(model, text, tokenizer)) for text in ("ab", "defgh", "a")]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_a_saved_model_is_loaded_at_the_first_call_and_judged_by_its_own_tokenizer(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    reward = SequenceClassifierReward(str(tmp_path), device="cpu", dtype=torch.float32)
    assert "model" not in vars(reward)
    assert reward(samples=SAMPLES) == pytest.approx([float(alone(model, sample)) for sample in SAMPLES], abs=1e-5)
    half = SequenceClassifierReward(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16 and isinstance(half(samples=["a"])[0], float)


def test_a_tokenizer_that_cannot_be_known_or_cannot_pad_is_asked_for():
    with pytest.raises(ValueError, match="pass tokenizer"):
        SequenceClassifierReward(classifier())
    with pytest.raises(ValueError, match="set its pad_token"):
        SequenceClassifierReward(classifier(), char_tokenizer(pad=False, eos=False))


def test_a_model_that_is_not_there_is_one_sentence_without_frames_of_the_library():
    with pytest.raises(OSError, match="No model at 'nomodel', which is the reward model: there is no such") as found:
        SequenceClassifierReward("nomodel")
    assert found.value.__suppress_context__ and [frame.path.name for frame in found.traceback] == [
        "test_reward_models.py"
    ]


def test_a_reward_model_trains_a_policy(tmp_path):
    config = tiny_config(tmp_path, "PPO", train={"total_steps": 1})
    reward = SequenceClassifierReward(classifier(), char_tokenizer())
    trainer = trlx.train(config=config, reward_fn=reward, prompts=PROMPTS)
    assert trainer.schedule.step == 1
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in reward.model.parameters())


# over HTTP

TO_ITSELF = (307, {}, ("Location", "/reward"))
"""A redirection that keeps the question."""


class Server:
    """A reward server on this machine that answers with the length of each sample, or with what `answers` has next."""

    def __init__(self):
        self.answers = []
        self.questions = []
        self.headers = []
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.questions.append(question)
                server.headers.append(dict(self.headers))
                lengths = {"rewards": [len(sample) for sample in question["samples"]]}
                answer = server.answers.pop(0) if server.answers else (200, lengths)
                if answer == "silence":
                    server.released.wait(30)
                if answer in ("silence", "hang up"):
                    return
                body = answer[1] if isinstance(answer[1], bytes) else json.dumps(answer[1]).encode()
                self.send_response(answer[0])
                for header in answer[2:]:
                    self.send_header(*header)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/reward"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def stop(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.stop()


def ask(server, samples=SAMPLES, **settings):
    reward = RemoteReward(server.url, **{"backoff": 0.001, **settings})
    texts = {"samples": samples, "prompts": [s[:1] for s in samples], "outputs": [s[1:] for s in samples]}
    return reward(**texts, tokenizer=object(), label=[np.float32(i) for i in range(len(samples))])


@pytest.mark.parametrize(("size", "requests"), [(None, [5]), (2, [2, 2, 1]), (9, [5])])
def test_texts_and_metadata_are_posted_in_batches_and_rewards_come_back_in_order(server, size, requests):
    assert ask(server, batch_size=size, headers={"Authorization": "Bearer x"}) == [3, 1, 8, 12, 1]
    assert [len(question["samples"]) for question in server.questions] == requests
    assert [len(question["metadata"]["label"]) for question in server.questions] == requests
    last = server.questions[-1]
    assert (last["samples"][-1], last["prompts"][-1], last["outputs"][-1]) == ("b", "b", "")
    assert last["metadata"]["label"][-1] == 4.0 and last.keys() == {"samples", "prompts", "outputs", "metadata"}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer x"}
    assert {headers["Content-Type"] for headers in server.headers} == {"application/json"}


def test_the_answer_may_say_scores_and_score_each_token(server):
    server.answers = [(200, {"scores": [[1.0, 2.0], 3]})]
    assert ask(server, samples=["ab", "c"]) == [[1.0, 2.0], 3]


@pytest.mark.parametrize("failure", [(500, {}), (503, {}), (429, {}), "hang up", TO_ITSELF])
def test_a_server_that_fails_twice_and_then_works_is_asked_three_times(server, failure):
    server.answers = [failure, failure]
    assert ask(server, retries=2) == [3, 1, 8, 12, 1]
    assert len(server.questions) == 3


def test_a_server_that_is_too_slow_once_is_asked_again(server):
    server.answers = ["silence"]
    assert ask(server, retries=1, timeout=1.0) == [3, 1, 8, 12, 1]


def test_a_server_that_goes_on_failing_is_given_up(server):
    server.answers = [(502, b"no model")] * 9
    with pytest.raises(RewardError, match="answered status 502 .*'no model'; gave up after 3 attempts"):
        ask(server, retries=2)
    assert len(server.questions) == 3
    server.answers = ["silence"] * 9
    with pytest.raises(RewardError, match="was silent for 0.1 seconds; gave up after 2 attempts"):
        ask(server, retries=1, timeout=0.1)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_the_server_refuses_is_not_asked_again(server, status):
    server.answers = [(status, {"error": "no such key"})]
    with pytest.raises(RewardError, match=f"answered status {status} .*no such key.*; gave up after 1 attempt$"):
        ask(server)
    assert len(server.questions) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"rewards": [1.0]}, "answered 1 rewards for 5 samples"),
        ({"rewards": 1.0}, r'must answer JSON \{"rewards": \[...\]\}, but answered .*1.0'),
        ({"values": [1.0] * 5}, "must answer"),
        ([1.0] * 5, "must answer"),
        (b"<html>", "must answer JSON .*but answered '<html>'"),
    ],
)
def test_an_answer_of_another_form_is_an_error_that_shows_it(server, answer, words):
    server.answers = [(200, answer)]
    with pytest.raises(RewardError, match=words):
        ask(server)
    assert len(server.questions) == 1


def test_a_server_that_is_not_there_is_an_error_after_all_attempts():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RewardError, match="could not be reached.*gave up after 2 attempts"):
            RemoteReward(url, retries=1, backoff=0.001)(samples=["a"], prompts=["a"], outputs=[""])


def test_waiting_grows_by_two_at_random_or_is_what_the_server_asks_for(server, monkeypatch):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    server.answers = [(500, {})] * 4 + [(429, {}, ("Retry-After", "70"))]
    before = random.getstate()
    ask(server, retries=5, backoff=1.0)
    assert waits.pop() == 70
    assert [0.5 * 2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(waits)] == [True] * 4
    assert len({wait / 2**i for i, wait in enumerate(waits)}) == 4 and random.getstate() == before


def test_wrong_addresses_and_metadata_are_named(server):
    with pytest.raises(ValueError, match="http:// or https://"):
        RemoteReward("file:///etc/passwd")
    with pytest.raises(RewardError, match="could not be reached.*port"):
        RemoteReward("http://127.0.0.1:http")(samples=["a"], prompts=["a"], outputs=[""])
    with pytest.raises(RewardError, match="metadata cannot be sent as JSON: <object"):
        RemoteReward(server.url)(samples=["a"], prompts=["a"], outputs=[""], thing=[object()])


def test_a_server_trains_a_policy_and_its_failure_stops_the_run(server, tmp_path):
    config = tiny_config(tmp_path / "good", "PPO", train={"total_steps": 1})
    prompts = [{"prompt": text, "number": i} for i, text in enumerate(PROMPTS)]
    trainer = trlx.train(config=config, reward_fn=RemoteReward(server.url), prompts=prompts)
    assert trainer.schedule.step == 1 and "number" in server.questions[0]["metadata"]
    server.answers = [(400, {"error": "no"})]
    config = tiny_config(tmp_path / "bad", "PPO", train={"total_steps": 1})
    with pytest.raises(RewardError, match="answered status 400"):
        trlx.train(config=config, reward_fn=RemoteReward(server.url), prompts=prompts)
