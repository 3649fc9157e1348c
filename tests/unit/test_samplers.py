"""What a sampler is told, and what it gives."""

import gc

import pytest
import torch

import trlx
from tests.runs import PROMPTS, run, share_of_a, tiny_config
from trlx.batch import Sample
from trlx.data.prompts import Prompt
from trlx.registry import register_sampler
from trlx.sampling.base import Sampler
from trlx.sampling.settings import SamplingConfig
from trlx.sampling.stopping import Stopper


@register_sampler("copying")
class CopyingSampler(Sampler):
    """Holds a copy of the weights, fetched once for each version, and answers every prompt with one token."""

    def __init__(self, backend, tokenizer, token=4):
        self.token = token
        self.copies = {}
        self.is_closed = False

    def close(self):
        self.is_closed = True

    def sync(self, version, weights):
        if version not in self.copies:
            self.copies[version] = {name: weight.clone() for name, weight in weights()}
        super().sync(version, weights)

    def generate(self, prompts, sampling):
        return [Sample([self.token, 5], version=self.version) for _ in prompts]


def test_a_sampler_with_a_copy_of_the_weights_gets_those_of_every_version(tmp_path):
    method = {"num_rollouts": 4, "chunk_size": 4, "ppo_epochs": 1}
    train = {"total_steps": 4, "batch_size": 2, "sampler": {"engine": "copying", "token": 6}, "eval_interval": 10}
    config = tiny_config(tmp_path, "PPO", method=method, train=train)
    trainer = trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config)
    copies = trainer.sampler.copies
    assert list(copies) == [0, 2, 4]  # two collections of two steps each, and the evaluation at the end
    policy = dict(trainer.backend.policy.model.named_parameters())
    assert copies[4].keys() == policy.keys()
    assert all(torch.equal(copies[4][name], weight) for name, weight in policy.items())
    assert not torch.equal(copies[0]["transformer.wte.weight"], copies[2]["transformer.wte.weight"])
    assert trainer.generate([[4, 5]]).tolist() == [[4, 5, 6, 5]]
    sampler = trainer.sampler
    assert not sampler.is_closed
    del trainer
    gc.collect()
    assert sampler.is_closed


def test_an_argument_that_a_registered_sampler_does_not_take_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train.sampler.tokens.*token"):
        run("PPO", tmp_path, train={"sampler": {"engine": "copying", "tokens": 6}})


def test_rollouts_know_the_weights_that_drew_them(tmp_path):
    seen = []
    config = tiny_config(tmp_path, "PPO", method={"num_rollouts": 4, "ppo_epochs": 2}, train={"total_steps": 4})
    trainer = trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config)
    trainer.log.write = lambda rollouts, *_: seen.extend(rollouts)
    trainer.collect()
    assert [rollout.version for rollout in seen] == [4] * 4


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([Sample([4])], "CopyingSampler.generate returned 1 for 2 prompts: return a list with one Sample for each"),
        (None, "CopyingSampler.generate returned NoneType for 2 prompts"),
        ([Sample([4]), Sample([])], r"returned sample 1 with the ids \[\]: return at least one id, each from 0 to 37"),
        ([Sample([4]), Sample([5, 38])], r"returned sample 1 with the ids \[5, 38\]"),
        ([Sample([4] * 7), Sample([5])], r"returned sample 0 with 7 ids: return at most max_new_tokens \(6\)"),
        ([Sample([4]), Sample([2, 0])], r"returned sample 1 with ids after the eos, \[2, 0\]"),
        ([Sample([4], [-1.0, -2.0]), Sample([4])], "returned sample 0 with 2 logprobs for 1 ids"),
        ([Sample([4], [0.5]), Sample([4])], "returned sample 0 with logprobs that are not finite or above 0"),
        ([Sample([4], [float("nan")]), Sample([4])], "returned sample 0 with logprobs that are not finite or above 0"),
    ],
)
def test_what_a_sampler_returns_is_checked(tmp_path, monkeypatch, samples, words):
    monkeypatch.setattr(CopyingSampler, "generate", lambda self, prompts, sampling: samples)
    config = tiny_config(tmp_path, "SFT", train={"sampler": "copying", "total_steps": 0})
    with pytest.raises(ValueError, match=words):
        trlx.train(samples=["ab"], eval_prompts=["a", "b"], config=config)


def test_a_sampler_that_is_far_from_the_policy_is_warned_of_once(tmp_path, monkeypatch, caplog):
    far = lambda self, prompts, sampling: [Sample([4, 5], [-9.0, -9.0]) for _ in prompts]  # noqa: E731
    monkeypatch.setattr(CopyingSampler, "generate", far)
    method = {"num_rollouts": 4, "ppo_epochs": 1}
    config = tiny_config(tmp_path, "PPO", method=method, train={"sampler": "copying", "total_steps": 2})
    trlx.train(reward_fn=share_of_a, prompts=PROMPTS, config=config)
    assert caplog.text.count("The log-probabilities of CopyingSampler are") == 1


def test_a_class_that_is_no_sampler_or_lacks_an_argument_is_refused(tmp_path):
    from trlx.registry import trainers

    class NoSampler:
        def __init__(self, backend, tokenizer, path):
            pass

    register_sampler("none")(NoSampler)
    for sampler, words in (
        ({"engine": "none"}, "train.sampler: .* missing 1 required positional argument: 'path'"),
        ({"engine": "none", "path": "x"}, "train.sampler: NoSampler must subclass trlx.sampling.base.Sampler"),
    ):
        config = tiny_config(tmp_path, "SFT", train={"sampler": sampler})
        with pytest.raises(ValueError, match=words):
            trainers.get(config.train.trainer)(config)


def test_virtual_tokens_cannot_be_copied(tmp_path):
    prompts = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
    trainer = run("SFT", tmp_path, model={"peft_config": prompts}, train={"total_steps": 0})
    with pytest.raises(ValueError, match="PROMPT_TUNING cannot be merged into a model, so a sampler"):
        list(trainer.backend.weights_by_name())


def test_log_probabilities_are_those_of_the_tokens_that_stay(tmp_path):
    from tests.builders import char_tokenizer

    prompt, stop = Prompt([4]), Stopper(char_tokenizer(), ["ab"])  # "a" is 4, "b" is 5
    cut = SamplingConfig(eos_token_id=2, stop=stop).rollout(prompt, Sample([6, 4, 5], [-1.0, -2.0, -3.0], version=3))
    assert (cut.response, cut.logprobs, cut.ended, cut.version) == ([6, 2], [-1.0], True, 3)
    whole = SamplingConfig(eos_token_id=2).rollout(prompt, Sample([6, 2], [-1.0, -2.0]), group=7)
    assert (whole.response, whole.logprobs, whole.ended, whole.group) == ([6, 2], [-1.0, -2.0], True, 7)
    assert SamplingConfig(eos_token_id=2).rollout(prompt, Sample([6])).logprobs is None
