"""Pairs of answers: the losses by hand, what becomes of samples, and the reference that reads them once."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch

import trlx
from tests.builders import char_tokenizer
from tests.runs import LABELS, PAIRS, PROMPTS, metrics, run, tiny_config
from tests.unit.test_chat import MARKED, PLAIN, chat, with_template
from trlx import checkpoint
from trlx.api import _config
from trlx.backends.accelerate import AccelerateBackend
from trlx.batch import Rollout, TokenOutputs
from trlx.data.collate import collate
from trlx.data.preferences import labelled, pairs
from trlx.method_configs import DPOConfig
from trlx.methods.masked import finish, pack
from trlx.methods.preferences import dpo_loss, kto_loss
from trlx.methods.units import Unit
from trlx.trainer.preferences import DPOTrainer, KTOTrainer, _mean_log_ratio


def one_pair():
    """The chosen answer is by 1 nat likelier than under the reference, the rejected one less likely by 1."""
    chosen = Rollout([4], [5, 6], ref_logprobs=[-1.5, -2.5])
    rejected = Rollout([4], [7], ref_logprobs=[-2.0])
    batch = collate([chosen, rejected, chosen, rejected], pad_id=0)
    mask = batch.response_mask.clone()
    mask[2:] = False  # a pair that only fills up a share
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, 0.0], [0.0] * 3, [0.0] * 3], requires_grad=True)
    return TokenOutputs(logprobs), batch.replace(response_mask=mask)


@pytest.mark.parametrize(
    ("settings", "loss", "chosen", "rejected"),
    [
        # h = 2, so with beta 0.5 the margin is 1: log(1 + 1/e), and 0.5 sigmoid(-1)
        ({"kind": "sigmoid", "beta": 0.5}, 0.313262, -0.134471, 0.134471),
        # 0.9 log(1 + 1/e) + 0.1 log(1 + e), and 0.5 (0.9 sigmoid(-1) - 0.1 sigmoid(1))
        ({"kind": "sigmoid", "beta": 0.5, "label_smoothing": 0.1}, 0.413262, -0.084471, 0.084471),
        # the means are 0.5 and -1, so the margin is 0.75; each of the two chosen tokens counts half
        ({"kind": "sigmoid", "beta": 0.5, "length_normalized": True}, 0.386871, -0.080205, 0.160411),
        # minus the mean of -1 and -2, twice
        ({"kind": "sigmoid", "beta": 0.5, "sft_coef": 2.0}, 3.313262, -1.134471, 0.134471),
        ({"kind": "hinge", "beta": 0.25}, 0.5, -0.25, 0.25),
        ({"kind": "hinge", "beta": 1.0}, 0.0, 0.0, 0.0),
        # (2 - 1 / (2 * 0.5))^2: further apart than asked for
        ({"kind": "ipo", "beta": 0.5}, 1.0, 2.0, -2.0),
        ({"kind": "ipo", "beta": 0.5, "length_normalized": True}, 0.25, 0.5, -1.0),
    ],
)
def test_each_loss_and_its_gradient(settings, loss, chosen, rejected):
    outputs, batch = one_pair()
    summed, found = dpo_loss(outputs, batch, **settings)
    summed.backward()
    assert summed.item() == pytest.approx(loss, abs=1e-6)
    expected = [[0, chosen, chosen], [0, rejected, 0], [0] * 3, [0] * 3]
    assert outputs.logprobs.grad.flatten().tolist() == pytest.approx(sum(expected, []), abs=1e-6)
    assert finish(*pack(found))["loss"] == pytest.approx(loss, abs=1e-6)
    # the trainer passes each setting on
    named = {"loss_type" if name == "kind" else name: value for name, value in settings.items()}
    assert DPOTrainer.loss(SimpleNamespace(method=DPOConfig(**named)), outputs, batch)[0] == summed


def test_statistics_are_means_over_pairs_and_rewards_are_beta_times_log_ratios():
    outputs, batch = one_pair()
    names = {"rewards/chosen": 0.5, "rewards/rejected": -0.5, "margin": 1, "accuracy": 1, "losses/sft": 1.5}
    names |= {"logprobs/chosen": -3, "logprobs/rejected": -3, "loss": math.log(1 + math.exp(-1))}
    assert finish(*pack(dpo_loss(outputs, batch, kind="sigmoid", beta=0.5)[1])) == pytest.approx(names)
    other = TokenOutputs(torch.zeros(4, 3))
    assert finish(*pack(dpo_loss(other, batch.replace(ref_logprobs=torch.zeros(4, 3)), "ipo", 1.0)[1]))["accuracy"] == 0


def texts(rollouts, tokenizer):
    return [tuple(map(tokenizer.decode, (rollout.prompt, rollout.response))) for rollout in rollouts]


def test_a_pair_of_texts_is_two_rows_chosen_first():
    tokenizer = char_tokenizer()
    rows = [
        {"prompt": "ab", "chosen": "c", "rejected": "de", "source": 7},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ]
    found = texts(pairs(rows, tokenizer, 9), tokenizer)
    assert found == [("ab", "c</s>"), ("ab", "de</s>"), ("<s>", "a</s>"), ("<s>", "b</s>")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        ("q: ab a: cd", "q: ab a: ce", "q: ab a:", (" cd", " ce")),
        ("is it so", "is it", "is it", (" so", "")),
        ("ab cd", "ab  cd", "ab", (" cd", "  cd")),
        ("word", "wordy", "", ("word", "wordy")),
    ],
)
def test_without_a_prompt_it_is_the_whole_words_that_both_texts_begin_with(chosen, rejected, prompt, answers):
    tokenizer = char_tokenizer()
    found = texts(pairs([{"chosen": chosen, "rejected": rejected}], tokenizer, 30), tokenizer)
    assert found == [(prompt or "<s>", f"{answer}</s>") for answer in answers]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("implicit", [False, True])
def test_of_chats_only_the_answers_are_trained_and_a_common_beginning_is_the_prompt(template, implicit):
    tokenizer = with_template(template)
    whole = [chat("a", "b", "c", "d"), chat("a", "b", "c", "e", "f", "g")]
    row = {"chosen": whole[0], "rejected": whole[1]}
    if not implicit:
        row = {"prompt": whole[0][:3], "chosen": whole[0][3:], "rejected": whole[1][3:]}
    chosen, rejected = pairs([row], tokenizer, 99)
    begins = "u:a<|end|>\na:b<|end|>\nu:c<|end|>\na:"
    first, second = texts([chosen, rejected], tokenizer)
    assert first == (begins, "d<|end|>") and second == (begins, "e<|end|>\nu:f<|end|>\na:g<|end|>")
    assert chosen.trained is None and rejected.trained == [True] * 2 + [False] * 8 + [True] * 2


def test_a_pair_without_room_for_its_answers_is_dropped_whole(caplog):
    rows = [{"prompt": "abcd", "chosen": "a", "rejected": "b"}, {"prompt": "ab", "chosen": "cd", "rejected": "e"}]
    tokenizer = char_tokenizer()
    assert texts(pairs(rows, tokenizer, 4), tokenizer) == [("ab", "cd"), ("ab", "e</s>")]
    dropped, cut = [record.message for record in caplog.records]
    assert "1 of 2 samples were dropped, because none of one answer's output tokens lies" in dropped
    assert "1 of 2 samples are longer than train.seq_length (4) and were cut" in cut


def test_pairs_of_equal_answers_are_counted_and_teach_nothing(caplog):
    tokenizer = char_tokenizer()
    rows = [{"prompt": "a", "chosen": "bcd", "rejected": end} for end in ("bcd", "bca", "b")]
    assert len(pairs(rows, tokenizer, 9)) == 6
    assert [record.message.split(",")[0] for record in caplog.records] == ["1 of 3 pairs have two equal answers"]
    caplog.clear()
    assert len(pairs(rows, tokenizer, 3)) == 6  # two of the pairs differ only behind the cut
    assert "2 of 3 pairs have two equal answers" in caplog.text and "so their comparison has no gradient" in caplog.text
    with pytest.raises(ValueError, match="2 of 2 pairs have two equal answers"):
        pairs(rows[:2], tokenizer, 3)


@pytest.mark.parametrize(
    ("answers", "length", "found"),
    [
        # 8 tokens: the longer answer has 5 with its eos, which leaves 3 to both prompts
        (("abcd", "a"), 8, [("fgh", "abcd</s>"), ("fgh", "a</s>")]),
        (("a", "abcd"), 8, [("fgh", "a</s>"), ("fgh", "abcd</s>")]),
        # no room is left, or the answer itself is cut: a bos stands for both prompts
        (("abcd", "a"), 5, [("<s>", "bcd</s>"), ("<s>", "a</s>")]),
        (("abcd", "a"), 4, [("<s>", "cd</s>"), ("<s>", "a</s>")]),
        # all of it has room
        (("abcd", "a"), 99, [("defgh", "abcd</s>"), ("defgh", "a</s>")]),
    ],
)
def test_cut_on_the_left_both_answers_of_a_pair_keep_one_prompt(answers, length, found):
    tokenizer = char_tokenizer()
    tokenizer.truncation_side = "left"
    row = {"prompt": "defgh", "chosen": answers[0], "rejected": answers[1]}
    assert texts(pairs([row], tokenizer, length), tokenizer) == found
    # a bos in front is kept, so one token less of the prompt is
    with_bos = pairs([{**row, "prompt": "<s>defgh"}], tokenizer, length)
    prompts = {8: "<s>gh", 5: "<s>", 4: "<s>", 99: "<s>defgh"}
    assert [prompt for prompt, _ in texts(with_bos, tokenizer)] == [prompts[length]] * 2


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_so_do_those_of_a_chat(template):
    tokenizer = with_template(template)
    tokenizer.truncation_side = "left"
    whole = [chat("a", "b", "c", "d"), chat("a", "b", "c", "e", "f", "g")]
    row = {"chosen": whole[0], "rejected": whole[1]}
    (short, one), (long, other) = texts(pairs([row], tokenizer, 20), tokenizer)
    assert short == long == "\nu:c<|end|>\na:" and (one, other) == (
        "d<|end|>",
        "e<|end|>\nu:f<|end|>\na:g<|end|>",
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("abc", "Sample 1 must have prompt and chosen and rejected, got 'abc'"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "Sample 1 must have prompt and chosen and rejected"),
        ({"prompt": "a", "chosen": chat("a", "b")[1:], "rejected": "c"}, "of one kind; got str, list, str"),
        ({"prompt": chat("a"), "chosen": chat("b"), "rejected": chat("c")}, "Sample 1, message 1: a message of user"),
    ],
)
def test_what_is_no_pair_is_named(row, words):
    with pytest.raises((ValueError, TypeError), match=words):
        pairs([PAIRS[0], row], with_template(PLAIN), 30)


def test_chats_without_a_common_beginning_need_a_prompt():
    shared = {"chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]}
    with pytest.raises(
        ValueError, match=r'Sample 0, message 0 must have "role" and "content"; .*: write "role" for "from"'
    ):
        pairs([shared], with_template(PLAIN), 30)
    with pytest.raises(ValueError, match="Sample 0: chosen and rejected begin with different messages"):
        pairs([{"chosen": chat("a", "b"), "rejected": chat("c", "d")}], with_template(PLAIN), 30)


def test_the_reference_reads_every_answer_once_and_a_run_begins_without_a_margin(tmp_path, monkeypatch, caplog):
    calls, evaluate = [], AccelerateBackend.evaluate
    monkeypatch.setattr("trlx.trainer.preferences.ROWS_AT_ONCE", 6)
    monkeypatch.setattr("trlx.trainer.evaluate.ROWS_AT_ONCE", 4)

    def counting(self, batch, reference=False):
        calls.append((len(batch), reference))
        return evaluate(self, batch, reference)

    monkeypatch.setattr(AccelerateBackend, "evaluate", counting)
    method = {"beta": 0.5, "label_smoothing": 0.25, "sft_coef": 0.5}
    trainer = run("DPO", tmp_path, method=method, train={"total_steps": 8, "eval_interval": 8, "minibatch_size": 2})
    # once 3 held-out pairs and 7 to train on; the policy reads the held-out ones at both evaluations
    assert [call for call in calls if call[1]] == [(6, True), (6, True), (6, True), (2, True)]
    assert [rows for rows, reference in calls if not reference and rows > 1] == [4, 2, 4, 2]
    first, *_, last = [line for line in metrics(tmp_path) if "loss" in line]
    assert first["margin"] == pytest.approx(0, abs=1e-6)
    assert first["loss"] == pytest.approx(math.log(2) + 0.5 * first["losses/sft"], abs=1e-5)
    assert last["margin"] > 0.1 and last["accuracy"] == 1
    evaluations = [line for line in metrics(tmp_path) if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 8]
    assert evaluations[0]["eval/margin"] == pytest.approx(0, abs=1e-6) and evaluations[1]["eval/accuracy"] == 1
    # nothing judges samples, so the best checkpoint is that of the highest held-out accuracy
    assert f"  best     accuracy 1 at step 8: {tmp_path}/best_checkpoint/hf_model" in caplog.text
    assert checkpoint.read_state(tmp_path / "best_checkpoint")[0]["best"] == [1.0, 8, "eval/accuracy"]
    seen = trainer.evaluator.held_out.args[0].rows(slice(None))
    found = finish(*pack(dpo_loss(evaluate(trainer.backend, seen), seen, "sigmoid", **method)[1]))
    assert evaluations[1] == pytest.approx(evaluations[1] | {f"eval/{name}": mean for name, mean in found.items()})
    # of the policy that has learnt; the rows still hold what it was at first
    batch = trainer.store.rows(slice(None))
    with torch.no_grad():
        again = evaluate(trainer.backend, batch, reference=True).logprobs
    assert torch.allclose(batch.ref_logprobs, again, atol=1e-6)
    assert not torch.allclose(evaluate(trainer.backend, batch).logprobs, again, atol=1e-2)
    settings = {"kind": "sigmoid", **method}
    outputs = evaluate(trainer.backend, batch)
    assert trainer.loss(outputs, batch)[0] == dpo_loss(outputs, batch, **settings)[0] and trainer.unit is Unit.PAIR


def test_pairs_choose_the_method(tmp_path):
    table = pytest.importorskip("datasets").Dataset.from_list(PAIRS)
    for samples in (PAIRS, [{"chosen": "a", "rejected": "b"}], table):
        assert _config({}, None, None, None, samples).train.trainer == "AccelerateDPOTrainer"
    for samples in (["text"], [{"text": "a"}], [[{"role": "user"}]], [], None):
        assert _config({}, None, None, None, samples).method.name == "SFTConfig"
    config = tiny_config(tmp_path, "DPO", train={"total_steps": 0})
    trainer = trlx.train(config=config, samples=table, eval_prompts=PROMPTS)
    assert [rollout.prompt for rollout in trainer.store.rollouts[:4]] == [[4, 5], [4, 5], [5], [5]]


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"method": {"loss_type": "sigmod"}}, {}, "method.loss_type: unknown value 'sigmod'. Did you mean 'sigmoid'"),
        ({"method": {"loss_type": "ipo", "label_smoothing": 0.1}}, {}, "must be 0 unless method.loss_type is sigmoid"),
        ({"method": {"label_smoothing": 0.5}}, {}, "must be at least 0 and less than 0.5, got 0.5"),
        ({"method": {"beta": 0.0}}, {}, "method.beta must be positive"),
        ({"train": {"batch_size": 3}}, {}, "keeps 2 rows together"),
        ({}, {"rewards": [1.0] * 7}, "AccelerateDPOTrainer does not use rewards"),
        ({}, {"samples": ["abc"]}, "Sample 0 must have chosen and rejected, got 'abc'"),
    ],
)
def test_wrong_settings_and_samples_are_refused(tmp_path, changes, arguments, words):
    with pytest.raises(ValueError, match=words):
        trlx.train(config=tiny_config(tmp_path, "DPO", **changes), **{"samples": PAIRS, **arguments})


def test_the_loss_of_labelled_answers_and_its_gradient():
    # log-ratios 2, -1, and a row that only fills up; less the KL of 0.5, times beta: 0.75 and -0.75
    good = Rollout([4], [5, 6], score=1.0, ref_logprobs=[-2.0, -3.0])
    bad = Rollout([4], [7], score=0.0, ref_logprobs=[-2.0])
    batch = collate([good, bad, good], pad_id=0)
    batch.response_mask[2] = False
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, 0.0], [0.0] * 3], requires_grad=True)
    loss, found = kto_loss(TokenOutputs(logprobs), batch, 0.5, 0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss.backward()
    # sigmoid(-0.75) = 0.320821, its derivative 0.217895; the bad answer: 0.5 * (0.5 + 1) = 0.75, too
    assert loss.item() == pytest.approx(5 * 0.320821, abs=1e-5)
    slopes = [0, -0.217895, -0.217895, 0, 3 * 0.5 * 0.217895, 0, 0, 0, 0]
    assert logprobs.grad.flatten().tolist() == pytest.approx(slopes, abs=1e-5)
    names = {"loss": 2.5 * 0.320821, "kl": 0.5, "accuracy": 1, "rewards/chosen": 1.0, "rewards/rejected": -0.5}
    assert finish(*pack(found)) == pytest.approx(names, abs=1e-5)
    assert finish(*pack(_mean_log_ratio(TokenOutputs(logprobs), batch)[1])) == {"log_ratio": pytest.approx(0.5)}
    # at a KL of 2.5 the good answer is on the wrong side
    assert finish(*pack(kto_loss(TokenOutputs(logprobs), batch, 2.5, 0.5)[1]))["accuracy"] == 0.5


def test_an_answer_to_another_prompt_is_cut_to_the_room_that_is_left_and_trains_the_same_tokens():
    own = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(seq_length=5)), store_of=list)
    rollouts = [Rollout([4, 5, 6], [7]), Rollout([4], [8, 9, 10], trained=[True, False, True])]
    first, second = KTOTrainer._mismatched(own, rollouts)
    assert (first.prompt, first.response, first.trained) == ([4, 5, 6], [8, 9], [True, False])
    assert (second.prompt, second.response, second.trained) == ([4], [7], None)


def test_of_a_labelled_chat_only_the_completion_is_trained():
    tokenizer, whole = with_template(MARKED), chat("a", "b", "c", "d")
    rows = labelled([{"prompt": whole[:3], "completion": whole[3:], "label": True}], tokenizer, 99)
    assert texts(rows, tokenizer) == [("u:a<|end|>\na:b<|end|>\nu:c<|end|>\na:", "d<|end|>")]
    assert rows[0].trained is None and rows[0].score == 1


def test_kto_compares_with_the_kl_on_answers_to_other_prompts(tmp_path):
    trainer = run("KTO", tmp_path, train={"total_steps": 8, "batch_size": 7, "eval_interval": 8})
    first, *_, last = [line for line in metrics(tmp_path) if "loss" in line]
    # four good answers of weight 1, three bad ones of weight 1.5, all with probability one half
    assert first["loss"] == pytest.approx((4 + 4.5) / 14, abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-6)
    assert last["rewards/chosen"] > last["rewards/rejected"] + 0.1
    rollouts, others = trainer.samples.rollouts, trainer.mismatched.rollouts
    assert [r.prompt for r in others] == [r.prompt for r in rollouts]
    assert [r.response for r in others] == [r.response for r in rollouts[1:] + rollouts[:1]]
    batch, backend = trainer.mismatched.rows(slice(None)), trainer.backend
    gaps = (backend.evaluate(batch).logprobs - backend.evaluate(batch, reference=True).logprobs).sum(dim=1).tolist()
    others[0].ref_logprobs = [number + 9 for number in others[0].ref_logprobs]
    gaps[0] -= 9 * len(others[0].response)
    assert gaps[0] < 0 < sum(gaps[1:])
    for rows in ([0], [2, 3], range(1, 7)):  # the KL is that of the batch, and never negative
        trainer.schedule.rows = lambda count, rows=rows: list(rows)
        trainer._next_batch()
        assert trainer.kl == pytest.approx(max(sum(gaps[row] for row in rows) / len(rows), 0), abs=1e-5)
    evaluations = [line for line in metrics(tmp_path) if "eval/loss" in line]
    check_held_out(trainer, evaluations)
    assert trainer.best_reward == max(line["eval/accuracy"] for line in evaluations)
    assert _config({}, None, None, None, LABELS).train.trainer == "AccelerateKTOTrainer"
    with pytest.raises(ValueError, match="Sample 0: label must be True or False, got 'good'"):
        labelled([{**LABELS[0], "label": "good"}], trainer.tokenizer, 16)


def check_held_out(trainer, evaluations):
    """Two good answers and a bad one, with a KL of their own: of each prompt with the next one's answer."""
    first, last = evaluations
    assert first["eval/loss"] == pytest.approx((1 + 1 + 1.5) / 6, abs=1e-5) and first["eval/kl"] == 0
    rows = [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (2, 0)]
    rollouts = [Rollout(trainer.samples.rollouts[p].prompt, trainer.samples.rollouts[a].response) for p, a in rows]
    batch, backend = collate(rollouts, trainer.tokenizer.pad_token_id), trainer.backend
    ratios = (backend.evaluate(batch).logprobs - backend.evaluate(batch, reference=True).logprobs).sum(dim=1).tolist()
    kl = max(sum(ratios[3:]) / 3, 0)
    good, bad = (0.5 * (ratios[0] + ratios[2]) / 2, 0.5 * ratios[1])
    losses = [1 / (1 + math.exp(0.5 * sign * (r - kl))) for r, sign in zip(ratios[:3], (1, -1, 1), strict=True)]
    wanted = {"loss": (losses[0] + 1.5 * losses[1] + losses[2]) / 3, "kl": kl, "rewards/chosen": good}
    wanted |= {"rewards/rejected": bad, "accuracy": sum(loss < 0.5 for loss in losses) / 3}
    found = {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}
    assert {name: found[name] for name in found if name in wanted} == pytest.approx(wanted, abs=1e-5)
    assert found.keys() - wanted.keys() == {"response_length", "ended"}


@pytest.mark.parametrize(("trainer", "samples"), [(DPOTrainer, PAIRS), (KTOTrainer, LABELS)])
@pytest.mark.parametrize("special", [True, False])
def test_texts_get_the_special_tokens_that_the_model_asks_for(trainer, samples, special):
    backend = SimpleNamespace(row_format=SimpleNamespace(special_tokens=special))
    own = SimpleNamespace(tokenizer=char_tokenizer(adds_eos=True), backend=backend)
    found = trainer.tokenized(own, samples, 16)
    assert found and all((rollout.prompt[-1] == 2) == special for rollout in found)


@pytest.mark.parametrize(("method", "shown"), [("DPO", ["0/6", "4/6", "0/14"]), ("KTO", ["0/3", "0/3", "0/7"])])
def test_a_signal_while_the_reference_reads_ends_the_run(tmp_path, monkeypatch, caplog, method, shown):
    # four rows at once: first the held-out ones, then those to train on, of which the second four are not read any more
    monkeypatch.setattr("trlx.trainer.preferences.ROWS_AT_ONCE", 4)
    evaluate, told, reads = AccelerateBackend.evaluate, [], []
    monkeypatch.setattr("trlx.run.display.Display.working", lambda self, text: told.append(text))

    def signalled(self, batch, reference=False):
        reads.extend([len(batch)] * reference)
        if len(reads) == 3:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, batch, reference)

    monkeypatch.setattr(AccelerateBackend, "evaluate", signalled)
    with pytest.raises(SystemExit) as stopped:
        run(method, tmp_path, train={"eval_interval": 100})
    assert stopped.value.code == 75 and "Stopped at step 0 by SIGTERM" in caplog.text and len(reads) == 3
    assert [text for text in told if "reference" in text] == [f"the reference reads answers {at}" for at in shown]
