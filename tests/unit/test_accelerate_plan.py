"""What the plan says a process of the Accelerate backend holds is what it does hold."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from benchmarks.megatron_memory import kept_activations, scored, size_of
from tests.builders import VOCABULARY, char_tokenizer, tiny_gpt2_config
from tests.runs import tiny_config
from tests.unit.test_step import Live
from trlx.__main__ import main
from trlx.backends.accelerate import AccelerateBackend
from trlx.batch import Rollout
from trlx.data.collate import collate
from trlx.launch.plan.accelerate import AccelerateRun, Launch
from trlx.models.cached import Reader
from trlx.strict import ConfigError

ROOT = Path(__file__).parents[2]

LLAMA = hf.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GPT2 = tiny_gpt2_config(layers=4)
MIDDLE = tiny_gpt2_config(vocab_size=1000, layers=6, hidden=192, n_head=6)
LORA = {"peft_type": "LORA", "r": 4}
LENGTH, RESPONSE, ROWS, LIMIT = 48, 32, 8, 2**33


def both(folder, method, model, model_changes=(), **train):
    """(backend, the same run on paper); every row has `LENGTH` tokens, of which the last `RESPONSE` are scored."""
    off = {"packing": "off", "cache_hidden_states": "off", "seq_length": LENGTH, "batch_size": ROWS}
    generated = {} if method == "Reward" else {"gen_kwargs": {"max_new_tokens": RESPONSE}}
    changes = {"model": {"model_path": model, **dict(model_changes)}, "train": {**off, "minibatch_size": ROWS, **train}}
    config = tiny_config(folder, method, method=generated, **changes)
    run = AccelerateRun(config, Launch(), LIMIT)
    sections = {"model": config.model, "optimizer": config.optimizer, "scheduler": config.scheduler}
    backend = AccelerateBackend(**sections, train=config.train, tokenizer=char_tokenizer(), needs=run.needs)
    return backend, run


@pytest.mark.parametrize(
    ("method", "model", "changes", "train"),
    [
        ("PPO", LLAMA, {"num_layers_unfrozen": 2}, {"mixed_precision": "bf16"}),
        ("PPO", GPT2, {"num_layers_unfrozen": 1}, {"minibatch_size": ROWS // 2}),
        ("ILQL", LLAMA, {}, {}),
        ("Reward", LLAMA, {}, {}),
        ("DPO", LLAMA, {"peft_config": LORA}, {}),
        ("GRPO", LLAMA, {}, {"gradient_checkpointing": True}),
        ("GRPO", GPT2, {}, {"gradient_checkpointing": "selective", "mixed_precision": "bf16"}),
        ("PPO", MIDDLE, {}, {}),
    ],
)
def test_a_process_holds_what_the_plan_says(tmp_path, monkeypatch, method, model, changes, train):
    monkeypatch.setattr(AccelerateRun, "samples", False)  # which has a test of its own
    backend, run = both(tmp_path, method, model, changes, **train)
    response = 1 if method == "Reward" else run.response
    batch = collate([Rollout([5] * (LENGTH - response), [6] * response)] * ROWS, 0)
    policy, phases = backend.policy, {phase.name: phase.parts for phase in run.phases()}
    assert (size_of(policy.parameters()), sum(backend.parameter_counts())) == (run.weights.size, total(run))
    kept = 0 if backend.reference is None else size_of(backend.reference._kept)
    assert phases["update"]["reference"] == kept
    with Live() as live, kept_activations([*policy.parameters(), *policy.buffers()]) as activations:
        backend.train_step(batch, scored)
    paper = run.rehearsal.update(run.rows, LENGTH, run.response)
    if not train.get("gradient_checkpointing"):  # what is computed again is not saved by autograd
        assert paper.kept == pytest.approx(activations.peak, rel=0.1)
    state = [value for each in backend.sharding.optimizer.state.values() for value in each.values()]
    moments = size_of(value for value in state if value.dim())
    assert phases["update"]["optimizer"] == moments
    # all that a step makes: the moments, which come at its end and stay, do not fall together with activations
    made = sum(phases["update"][name] for name in ("gradients", "activations", "temporary") if name in phases["update"])
    assert max(made, moments + run.weights.trained_size) == pytest.approx(live.peak, rel=0.1)
    with Live() as live, backend.for_sampling():
        backend.evaluate(batch)
    if "scoring" in phases:
        assert phases["scoring"]["temporary"] == pytest.approx(live.peak, rel=0.1)


def total(run):
    return run.weights.model + (run.weights.size - run.weights.model * 4) / 4


def test_keys_and_values_take_what_the_plan_says(tmp_path):
    backend, run = both(tmp_path, "PPO", LLAMA)
    reader = Reader(backend.policy.model, "cpu")
    with torch.no_grad():
        reader.join([[5] * (LENGTH - 1)], [run.rows_sampled])
    tensors = [room for layer in reader.cache.layers for room in layer.room]
    # 16 columns are free; the hidden states of the rows and their mask are small
    assert run.rehearsal.sampling(run.rows_sampled, 16, LENGTH).kept == pytest.approx(size_of(tensors), rel=0.1)


@pytest.mark.parametrize("number", [1, 2])
def test_the_scaling_page_shows_what_the_command_prints(tmp_path, monkeypatch, capsys, number):
    page = (ROOT / "docs" / "scaling.md").read_text()
    example = page.split("<!-- printed -->\n```\n$ trlx ")[number].partition("\n```")[0]
    typed, *shown = example.replace("\\\n", "").splitlines()
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    more = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}
    hf.LlamaConfig(**sizes, **more).save_pretrained(tmp_path / "path" / "to" / "llama")
    monkeypatch.chdir(tmp_path)
    assert main(typed.split()) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown


def test_a_launch_is_read_from_its_file():
    whole = Launch.read("fsdp2_whole_step", 4)
    assert (whole.processes, whole.shards, whole.reshards, whole.mixed_precision) == (4, True, False, "bf16")
    assert Launch.read("ddp", None) == Launch(8, mixed_precision="bf16") and Launch.read(None, None) == Launch()
    with pytest.raises(ConfigError, match="does not know DEEPSPEED .zero2.: write ddp, fsdp2 or fsdp2_whole_step"):
        Launch.read("zero2", 4)
