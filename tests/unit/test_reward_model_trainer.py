"""Reward models: the loss, the token that is scored, what is saved, and a run from pairs to PPO."""

import math
import statistics

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trlx
from tests.builders import char_tokenizer, tiny_gpt2_config
from tests.runs import PROMPTS, metrics, run, tiny_config, weights
from tests.runs import WITH_MARGIN as PAIRS
from tests.unit.tiny_models import FAMILIES
from trlx import SequenceClassifierReward
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.collate import collate
from trlx.methods.masked import finish, pack
from trlx.methods.reward import calibration_error, reward_loss
from trlx.models.architecture import Scored, architecture_for
from trlx.models.decoder import output_head
from trlx.models.policy import build_policy, load_model
from trlx.trainer.accelerate import AccelerateRewardTrainer
from trlx.trainer.reward import whole_pairs

SLOPE = 1 / (1 + math.e)  # of -log sigmoid(x) at x = 1, downwards


def of_pairs(margins, fills_up=0):
    """Rows of three tokens, the last `fills_up` pairs without a response token."""
    rows = 2 * len(margins)
    mask = torch.ones(rows, 3, dtype=torch.bool)
    responses = mask.clone()
    responses[:, 0] = False
    responses[rows - 2 * fills_up :] = False
    scores = torch.zeros(rows, 3)
    scores[0::2, 2] = torch.tensor(margins)
    return TokenBatch(torch.zeros(rows, 3, dtype=torch.int64), mask, responses, scores)


def test_the_loss_is_bradley_terry_less_the_margin_and_a_pair_that_fills_up_does_not_count():
    rewards = torch.tensor([2.0, 0.5, 0.0, 1.0, 7.0, -7.0], requires_grad=True)
    loss, found = reward_loss(TokenOutputs(torch.zeros(6, 3), last=rewards), of_pairs([0.5, -2.0, 3.0], fills_up=1))
    loss.backward()
    # both pairs: difference less margin is 1
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1)), abs=1e-6)
    assert rewards.grad.tolist() == pytest.approx([-SLOPE, SLOPE, -SLOPE, SLOPE, 0, 0], abs=1e-6)
    expected = {"loss": loss.item() / 2, "accuracy": 0.5, "margin": 0.25, "rewards/mean": 3.5 / 4, "rewards/min": 0}
    numbers = finish(*pack(found))
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    assert numbers["rewards/std"] == pytest.approx(torch.tensor([2.0, 0.5, 0.0, 1.0]).std().item())


def test_centring_pulls_the_sum_of_a_pair_to_0(tmp_path):
    rewards = torch.tensor([2.0, 1.0], requires_grad=True)
    trainer = AccelerateRewardTrainer(tiny_config(tmp_path, "Reward", method={"center_coef": 0.1}))
    loss, _ = trainer.loss(TokenOutputs(torch.zeros(2, 3), last=rewards), of_pairs([0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.1 * 9, abs=1e-6)
    assert rewards.grad.tolist() == pytest.approx([-SLOPE + 0.1 * 2 * 3, SLOPE + 0.1 * 2 * 3], abs=1e-6)


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy_in_each_bin():
    def ahead(p):
        return math.log(p / (1 - p))

    # 0.73 and 0.75 share a bin, in which one of two is right; 0.95 is wrong
    pairs = torch.tensor([ahead(0.73), -ahead(0.75), -ahead(0.95)])
    assert calibration_error(pairs) == pytest.approx((abs(0.73 + 0.75 - 1) + 0.95) / 3, abs=1e-6)
    assert calibration_error(torch.zeros(4)) == 0  # knows nothing, and says so
    assert calibration_error(torch.tensor([50.0])) == pytest.approx(0, abs=1e-6)


def scored_policy(config, **needs):
    torch.manual_seed(0)
    policy = build_policy(load_model(config, {}, Scored), architecture=Scored, **needs).eval()
    with torch.no_grad():
        output_head(policy.model).weight.normal_()
    return policy


def test_the_score_is_read_at_the_last_token_of_a_row_by_length_even_where_pad_is_eos():
    policy = scored_policy(tiny_gpt2_config(pad_token_id=2))
    rows = [[5, 6, 2], [7, 2, 2, 8, 9, 2], [4, 2]]
    batch = collate([Rollout(row[:1], row[1:]) for row in rows], pad_id=2)
    with torch.no_grad():
        outputs = policy(batch.tokens, batch.attention_mask, batch.response_mask)
        for row, score in zip(rows, outputs.last, strict=True):
            states = policy.model.transformer(torch.tensor([row])).last_hidden_state
            assert float(score) == pytest.approx(float(policy.model.score(states)[0, -1, 0]), abs=1e-6)
    assert outputs.last.dtype == torch.float32 and not outputs.logprobs.any()


CLASSIFIERS = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("name", [*CLASSIFIERS, "gemma2", "phi", "mixtral"])
def test_every_family_with_a_classifier_is_saved_with_identical_scores(name, tmp_path):
    family = FAMILIES[name]
    config = family.config(**family.sizes)
    assert architecture_for(config, "causal", {}, score_head=True) is Scored
    policy = scored_policy(config)
    policy.model.config.pad_token_id = 0
    policy.save_model(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0]])
    mask = tokens > 0
    with torch.no_grad():
        said = policy(tokens, mask, torch.zeros_like(mask)).last
        assert torch.allclose(loaded(tokens, attention_mask=mask.long()).logits[:, 0], said, atol=1e-6)
    assert loaded.config.num_labels == 1 and abs(said[0] - said[1]) > 1e-3


@pytest.mark.parametrize(("layers", "trained"), [(0, {"score"}), (1, {"score", "transformer.h.1", "transformer.ln_f"})])
def test_the_score_trains_however_many_blocks_are_frozen(layers, trained):
    model = scored_policy(tiny_gpt2_config(), num_layers_unfrozen=layers).model
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(any(name.startswith(prefix) for prefix in trained) for name in names)
    assert "score.weight" in names and len(names) == (1 if layers == 0 else 15)


def scores_of(folder, samples):
    """What plain transformers says about texts that end with eos, padded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = tokenizer([text + tokenizer.eos_token for text in samples], padding=True, return_tensors="pt")
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].tolist()


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_what_is_saved_scores_as_the_trainer_does_in_plain_transformers_and_as_a_reward(tmp_path, pad_is_eos, caplog):
    tokenizer = {"tokenizer_path": char_tokenizer(pad_is_eos=pad_is_eos)}
    trainer = run("Reward", tmp_path / "run", tokenizer=tokenizer, train={"total_steps": 30, "eval_interval": 30})
    trainer.save_pretrained(tmp_path / "reward")
    rows = trainer.evaluator.run().rows
    texts = [(sample["prompt"] + sample["chosen"], sample["prompt"] + sample["rejected"]) for sample in PAIRS[:3]]
    expected = [score for row in rows for score in row[2:]]
    flat = [text for pair in texts for text in pair]
    assert scores_of(tmp_path / "reward", flat) == pytest.approx(expected, abs=1e-6)
    reward = SequenceClassifierReward(str(tmp_path / "reward"))
    assert reward(samples=flat) == pytest.approx(expected, abs=1e-6)
    for ended in ([text + "</s>" for text in flat], [f"{text}</s>{reward.tokenizer.pad_token * 2}" for text in flat]):
        assert reward(samples=ended) == pytest.approx(expected, abs=1e-6)
    short = SequenceClassifierReward(str(tmp_path / "reward"), max_length=3)  # the eos has room, too
    assert short(samples=["abcdef"]) == pytest.approx(reward(samples=["ef"]), abs=1e-6)
    assert all(chosen > rejected for _, _, chosen, rejected in rows)
    last = metrics(tmp_path / "run")[-1]
    assert f"  best     accuracy 1 at step {trainer.best_step}: " in caplog.text
    assert trainer.best_reward == last["eval/accuracy"] == 1 and last["eval/calibration_error"] < 0.2
    ahead = [chosen - rejected for _, _, chosen, rejected in rows]
    margins = [pair["margin"] for pair in PAIRS[:3]]
    losses = [math.log(1 + math.exp(m - a)) for a, m in zip(ahead, margins, strict=True)]
    wanted = {"loss": sum(losses) / 3, "margin": sum(ahead) / 3, "rewards/mean": sum(expected) / 6}
    wanted["rewards/std"] = statistics.stdev(expected)
    assert {name: last[f"eval/{name}"] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    assert [tuple(row[:2]) for row in rows] == [(f"{chosen}</s>", f"{rejected}</s>") for chosen, rejected in texts]
    if not pad_is_eos:
        config = tiny_config(tmp_path / "ppo", "PPO", train={"total_steps": 2})
        trlx.train(reward_fn=reward, prompts=PROMPTS, config=config)
        assert metrics(tmp_path / "ppo")[-1]["step"] == 2


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_is_bit_equal_and_pairs_stay_whole(tmp_path, kind):
    model = {"num_layers_unfrozen": 1}
    if kind == "lora":
        pytest.importorskip("peft")
        model = {"peft_config": {"peft_type": "LORA", "r": 2}}
    # 7 pairs in batches of two pairs: the last one of an epoch is short
    train = {"checkpoint_interval": 3, "minibatch_size": 2, "gradient_checkpointing": True}
    run("Reward", tmp_path / "whole", model=model, train={**train, "total_steps": 6})
    run("Reward", tmp_path / "parts", model=model, train={**train, "total_steps": 3})
    resume = {"resume_from_checkpoint": str(tmp_path / "parts" / "checkpoint_3")}
    run("Reward", tmp_path / "parts", model=model, train={**train, "total_steps": 6, **resume})
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any("score" in name for name in whole)


def test_an_adapter_merged_into_the_model_scores_as_the_trainer_does(tmp_path):
    pytest.importorskip("peft")
    model = {"peft_config": {"peft_type": "LORA", "r": 2}}
    trainer = run("Reward", tmp_path / "run", model=model, train={"total_steps": 4})
    trainer.save_pretrained(tmp_path / "merged", merge=True)
    expected = [score for row in trainer.evaluator.run().rows for score in row[2:]]
    flat = [sample["prompt"] + sample[name] for sample in PAIRS[:3] for name in ("chosen", "rejected")]
    assert scores_of(tmp_path / "merged", flat) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "arguments", "error"),
    [
        ({}, {"samples": ["ab"]}, "Sample 0 must have chosen and rejected"),
        ({}, {"samples": [{**PAIRS[0], "margin": "big"}]}, "Sample 0 has the margin 'big'"),
        ({}, {"samples": [{**PAIRS[0], "margin": math.nan}]}, "Sample 0 has the margin nan"),
        ({}, {"samples": [{"chosen": "a" * 20, "rejected": "b"}]}, "1 of 1 pairs were dropped"),
        ({}, {"eval_prompts": ["a"]}, "generates nothing, so it has no use for eval_prompts: pass eval_samples"),
        ({}, {"metric_fn": len}, "nothing would use metric_fn"),
        ({}, {"stop_sequences": ["a"]}, "nothing would use stop_sequences"),
        ({"train": {"sampler": "recorded"}}, {}, "nothing would use train.sampler"),
        ({"train": {"minibatch_size": 1}}, {}, "pair|together|multiple"),
        ({"model": {"model_arch_type": "seq2seq"}}, {}, "a reward model needs causal"),
        ({"method": {"center_coef": -1}}, {}, "method.center_coef"),
        ({"model": {"peft_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}}}, {}, "virtual tokens"),
    ],
)
def test_what_a_reward_model_cannot_do_is_refused(tmp_path, changes, arguments, error):
    with pytest.raises((ValueError, TypeError), match=error):
        trlx.train(config=tiny_config(tmp_path, "Reward", **changes), **{"samples": PAIRS, **arguments})


def test_models_without_a_classifier_are_refused_before_they_are_loaded():
    from transformers import BertConfig, MambaConfig, T5Config

    for config, problem in ((T5Config(), "has an encoder"), (MambaConfig(), "has no classifier in transformers")):
        with pytest.raises(ValueError, match=f"{config.model_type} {problem}, so it cannot be a reward model"):
            architecture_for(config, "causal", {}, score_head=True)
    small = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot be a reward model"):
        build_policy(load_model(small, {}, Scored), architecture=Scored)


def test_a_quantized_model_is_refused():
    model = scored_policy(tiny_gpt2_config()).model
    model.is_quantized = True
    with pytest.raises(ValueError, match="A reward model cannot be quantized"):
        Scored.prepare(model, char_tokenizer())


def test_a_reward_model_has_nothing_to_generate(tmp_path):
    trainer = trlx.train(config=tiny_config(tmp_path, "Reward", train={"total_steps": 1}), samples=PAIRS)
    with pytest.raises(TypeError, match="A reward model scores texts and generates none"):
        trainer.generate("ab")
    assert all("eval/accuracy" not in line for line in metrics(tmp_path))  # no held-out pairs, no evaluation
    trainer.backend.policy.model.score.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError):  # no checkpoint of a model that has diverged
        trainer.save()


def test_a_pair_whose_answer_has_no_room_for_its_eos_is_dropped_whole(caplog):
    samples = [{"prompt": "ab", "chosen": "c", "rejected": "cdef"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    tokenizer = char_tokenizer()
    rows = whole_pairs([*samples, {"prompt": "b", "chosen": "abcde", "rejected": "a"}], tokenizer, 6)
    assert [row.prompt + row.response for row in rows] == [[4, 5, 2], [4, 6, 2]]
    assert "2 of 3 pairs were dropped" in caplog.text
    tokenizer.truncation_side = "left"
    rows = whole_pairs(samples[:1], tokenizer, 6)
    assert [row.prompt + row.response for row in rows] == [[5, 6, 2], [5, 6, 7, 8, 9, 2]]
