"""What a run may be started with, and what is decided or refused before anything is sampled."""

import json
import re
import traceback

import pytest
from transformers import GPTJConfig, LlamaConfig, T5Config

import trlx
from tests.builders import VOCABULARY, char_tokenizer, tiny_gpt2_config
from tests.runs import TEXTS, run, share_of_a, tiny_config
from trlx.api import _config
from trlx.method_configs import MethodConfig
from trlx.presets import load_preset
from trlx.registry import register_method
from trlx.sampling.stopping import Stopper
from trlx.strict import ConfigError
from trlx.trainer.schedule import Schedule


def test_a_config_may_be_a_dict_over_the_preset_that_the_arguments_ask_for(tmp_path):
    online, offline = ({"train": {"seed": 3}, "method.gamma": 0.5}, "m", share_of_a, None), ({"train.seed": 3}, None)
    config = _config(*online)
    assert (
        config.to_dict()
        == load_preset("ppo").evolve(train={"seed": 3}, method={"gamma": 0.5}, model={"model_path": "m"}).to_dict()
    )
    names = [_config(*offline, None, rewards).method.name for rewards in (None, [1.0])]
    assert names == ["SFTConfig", "ILQLConfig"]
    assert _config({"method": {"name": "RFTConfig"}}, None, share_of_a, None).train.trainer == "AccelerateRFTTrainer"
    with pytest.raises(ConfigError, match="Unknown key 'train.sed'. Did you mean 'seed'"):
        _config({"train": {"sed": 3}}, None, share_of_a, None)


def test_a_config_of_all_sections_stands_on_its_own():
    whole = tiny_config("x", "ILQL").to_dict()
    found = _config(whole, None, None, [1.0]).to_dict()
    assert {**found, "tokenizer": None} == {**whole, "tokenizer": None}  # tokenizers are equal to themselves only
    assert "do_sample" not in _config(whole, None, share_of_a, None).method.gen_kwargs  # which ppo.yaml has


def test_a_config_may_be_the_name_of_a_preset_or_a_file(tmp_path):
    assert _config("ilql", None, None, [1.0]).to_dict() == load_preset("ilql").to_dict()
    (tmp_path / "mine.yaml").write_text(json.dumps(load_preset("sft", overrides=["train.seed=5"]).to_json()))
    for path in (tmp_path / "mine.yaml", str(tmp_path / "mine.yaml")):
        assert _config(path, None, None, None).train.seed == 5
    (tmp_path / "part.yml").write_text("train: {seed: 6}\nmethod.gamma: 0.5\n")
    part = _config(str(tmp_path / "part.yml"), "m", share_of_a, None)
    assert (part.train.seed, part.method.gamma, part.method.name, part.model.model_path) == (6, 0.5, "PPOConfig", "m")
    with pytest.raises(ValueError, match="There is no file other.yml in"):
        _config(str(tmp_path / "other.yml"), None, share_of_a, None)
    with pytest.raises(ValueError, match="Unknown preset 'ppoo'. Did you mean 'ppo'"):
        _config("ppoo", None, share_of_a, None)
    with pytest.raises(TypeError, match="config must be a TRLConfig, a dict, or the name of a preset or file, got 3"):
        _config(3, None, share_of_a, None)


def test_a_dict_may_name_a_method_of_ones_own():
    @register_method
    class Own(MethodConfig):
        gen_kwargs = {"max_new_tokens": 3}

    config = _config({"method": {"name": "Own"}, "train.seed": 2}, None, share_of_a, None)
    assert (type(config.method), config.train.seed, config.train.epochs) == (Own, 2, 100)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("learning_rate", "'learning_rate'. Write optimizer.kwargs.lr; settings go into config={...}"),
        ("reward_funcs", "'reward_funcs'. Write trlx.train(reward_fn=...);"),
        ("evalprompts", "'evalprompts'. Did you mean 'eval_prompts'?"),
    ],
)
def test_an_argument_that_train_does_not_take_is_answered_with_what_to_write(name, words):
    with pytest.raises(TypeError, match=re.escape(f"train() has no argument {words}")) as refused:
        trlx.train("gpt2", **{name: 1})
    assert {entry.filename for entry in traceback.extract_tb(refused.value.__traceback__)} == {__file__}


def test_no_prompts_are_refused_with_what_brings_the_originals_back(tmp_path):
    words = r"no prompts: pass prompts=.*write prompts=\[tokenizer.bos_token or tokenizer.eos_token\] \* 4"
    with pytest.raises(ValueError, match=words):
        trlx.train(config=tiny_config(tmp_path, "PPO"), reward_fn=share_of_a)
    seen = []
    prompts = [char_tokenizer().bos_token] * 4
    config = tiny_config(tmp_path, "PPO", train={"total_steps": 0})
    trlx.train(config=config, reward_fn=lambda prompt_ids, **_: seen.extend(prompt_ids) or [0.0] * 4, prompts=prompts)
    assert seen == [[1]] * 4


def test_epochs_alone_may_decide_how_long_a_run_is(tmp_path):
    # 2 epochs of 8 texts in batches of 4; of RFT nobody knows how many rows an epoch has
    train = {"total_steps": None, "tags": None, "epochs": 2}
    assert run("SFT", tmp_path / "sft", train=train).schedule.step == 4
    assert (tmp_path / "sft" / "checkpoint_4").is_dir()
    trainer = run("RFT", tmp_path / "rft", train=train)
    assert (trainer.total_steps, trainer.schedule.epoch) == (None, 2)
    assert (tmp_path / "rft" / f"checkpoint_{trainer.schedule.step:06d}").is_dir()


def test_what_reward_fn_asks_for_must_be_in_the_prompts_too_and_not_only_in_those_of_evaluations(tmp_path):
    seen = []

    def reward(outputs, label):
        seen.append(label)

    evaluated = [{"prompt": "a", "label": 1}]
    with pytest.raises(ValueError, match="reward_fn asks for 'label', which nothing provides"):
        trlx.train(reward_fn=reward, prompts=["a"], eval_prompts=evaluated, config=tiny_config(tmp_path, "PPO"))
    assert not seen


def test_the_last_step_counts_every_pass_and_the_short_batch_at_its_end(tmp_path):
    train = tiny_config(tmp_path, "SFT", train={"epochs": 2, "total_steps": None, "batch_size": 4}).train
    schedule = Schedule(train, passes_per_epoch=3, data_size=2)
    # nine rows are a batch of eight and one of one
    assert (schedule.last_step(9), schedule.last_step(8), schedule.last_step(None)) == (12, 6, None)
    train.total_steps = 7
    assert (schedule.last_step(9), schedule.last_step(8), schedule.last_step(None)) == (7, 6, 7)


def test_rollouts_are_logged_into_a_folder_that_need_not_exist(tmp_path):
    folder = tmp_path / "a" / "b"
    run("PPO", tmp_path / "run", train={"rollout_logging_dir": str(folder), "total_steps": 1})
    (logged,) = folder.glob("run-*/epoch-*.json")
    assert len(json.loads(logged.read_text())) == 8
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="train.rollout_logging_dir is .*file, but .*file is a file: name another"):
        run("PPO", tmp_path / "run", train={"rollout_logging_dir": str(tmp_path / "file")})


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (tiny_gpt2_config(n_positions=16), 16),
        (GPTJConfig(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=1, n_head=2, rotary_dim=4), 16),
    ],
    ids=["learned", "a table of sines"],
)
def test_rows_longer_than_a_table_of_positions_are_refused(tmp_path, config, fits):
    model = {"model_path": config}
    with pytest.raises(
        ValueError, match="seq_length is 17, but the model has positions for 16 tokens: write 16 or less"
    ):
        run("SFT", tmp_path, model=model, train={"seq_length": fits + 1})
    run("SFT", tmp_path, model=model, train={"seq_length": fits, "total_steps": 0})


def test_rows_longer_than_rotary_positions_are_warned_of(tmp_path, caplog):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes)
    run("SFT", tmp_path, model={"model_path": config}, train={"seq_length": 16, "total_steps": 0})
    assert "positions" not in caplog.text
    run("SFT", tmp_path, model={"model_path": config}, train={"seq_length": 17, "total_steps": 0})
    assert (
        "train.seq_length is 17, but the model has positions for 16 tokens: it was not trained on longer rows"
        in caplog.text
    )


T5 = T5Config(
    vocab_size=VOCABULARY,
    d_model=16,
    d_kv=8,
    d_ff=16,
    num_layers=1,
    num_heads=2,
    decoder_start_token_id=0,
    eos_token_id=2,
)


def test_a_model_with_an_encoder_is_taken_for_one(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = run("SFT", tmp_path, model={"model_path": T5}, train={"total_steps": 1})
    assert trainer.backend.row_format.separator == "<sep>"
    assert "The model (t5) has an encoder: model.model_arch_type is read as seq2seq" in caplog.text
    trainer.backend.policy.model.save_pretrained(tmp_path / "t5")
    trainer = run(
        "SFT",
        tmp_path,
        model={"model_path": str(tmp_path / "t5")},
        tokenizer={"tokenizer_path": char_tokenizer()},
        train={"total_steps": 0},
    )
    assert trainer.backend.row_format.separator == "<sep>"


def test_a_decoder_is_not_trained_as_if_it_had_an_encoder(tmp_path):
    with pytest.raises(ValueError, match="model_arch_type is 'seq2seq', but gpt2 models have no encoder: write causal"):
        run("SFT", tmp_path, model={"model_arch_type": "seq2seq"})


@pytest.mark.parametrize(
    ("algorithm", "changes"), [("PPO", {"num_layers_unfrozen": 3}), ("SFT", {"num_layers_unfrozen": 3})]
)
def test_more_blocks_than_there_are_cannot_be_unfrozen(tmp_path, algorithm, changes):
    with pytest.raises(ValueError, match="num_layers_unfrozen is 3, but GPT2LMHeadModel has 2 blocks"):
        run(algorithm, tmp_path, model=changes)


def test_a_text_is_answered_with_a_text(tmp_path):
    config = tiny_config(tmp_path, "SFT", train={"total_steps": 0})
    trainer = trlx.train(config=config, samples=TEXTS)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    texts = trainer.generate(["ab", "cad"], **greedy)
    ids = [trainer.tokenizer(text)["input_ids"] for text in ("ab", "cad")]
    alone = [trainer.generate([row], **greedy)[0, len(row) :] for row in ids]
    assert texts == trainer.tokenizer.batch_decode(alone, skip_special_tokens=True) and len(set(texts)) == 2
    assert trainer.generate("ab", **greedy) == texts[0]
    assert trainer.generate(("ab",), **greedy) == texts[:1]
    trainer.stopper = Stopper(trainer.tokenizer, [texts[0][2]])
    assert trainer.generate("ab", **greedy) == texts[0][: texts[0].index(texts[0][2])]
    with pytest.raises(ValueError, match="Unknown key 'gen_kwargs.temprature'"):
        trainer.generate("ab", temprature=1.0)
    with pytest.raises(ValueError, match="gen_kwargs.beta is 1, but only ILQL has the Q heads"):
        trainer.generate("ab", beta=1)
    for nothing, problem in (([], "no prompts"), ([[]], "a prompt without tokens")):
        with pytest.raises(ValueError, match=rf"trainer.generate\(\) got {problem}"):
            trainer.generate(nothing)
    for wrong in (None, 5, [4, 5], [[0.5]], trainer.tokenizer(["ab"])):
        with pytest.raises(TypeError, match=r"trainer.generate\(\) takes a text or a chat, a list of them, token ids"):
            trainer.generate(wrong)
    with pytest.raises(ValueError, match="Prompt 0 has 61 tokens, which with max_new_tokens=5 are more than the 64"):
        trainer.generate("a" * 61, **greedy)
    assert isinstance(trainer.generate("a" * 59, **greedy), str)
    with pytest.raises(ValueError, match="Prompt 1 has the token -1, but the model knows 38 tokens"):
        trainer.generate([[4], [-1]])
