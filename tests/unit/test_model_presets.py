"""Presets that are put together from a method, a model, an adapter or a backend, and a number of GPUs."""

import itertools
import re

import pytest
from transformers import AutoConfig

import trlx
from docs.preset_tables import MARK, PAGE, on_paper, page, planned_size, written_sizes
from tests.builders import char_tokenizer
from tests.runs import DATA
from tests.unit.megatron_configs import settings_of
from trlx.backends.megatron.size_checks import check_sizes
from trlx.launch.plan.parameters import total_parameters
from trlx.launch.plan.run import TRAINERS, read_run
from trlx.launch.settings import settings_of as typed
from trlx.model_presets import layout, layouts, shape_of, tables
from trlx.presets import METHODS, load_preset, preset_parts
from trlx.strict import ConfigError

MODELS = list(tables()["models"])
LAYOUTS = [(model, kind, gpus) for model in MODELS for kind, found in layouts(model).items() for gpus in found]
"""Every division of every model."""


def parts(model: str, kind: str, gpus: int) -> list[str]:
    return [model, *([] if kind == "full" else [kind]), f"{gpus}gpu"]


def test_every_model_on_every_number_of_gpus_is_a_whole_configuration():
    methods = itertools.cycle([method for method in METHODS if f"{method.upper()}Config" in TRAINERS])
    for names, method in zip(LAYOUTS, methods, strict=False):
        config, found = load_preset(method, *parts(*names)), layouts(names[0])[names[1]][names[2]]
        train = config.train
        assert config.model.model_path == tables()["models"][names[0]]["hub"] and config.model.num_layers_unfrozen == -1
        assert train.batch_size * found.data == {1: 64, 8: 128, 16: 256, 64: 512}[found.gpus]
        assert train.batch_size % train.minibatch_size == 0 and train.mixed_precision == "bf16"
        assert train.trainer == f"{'NeMo' if names[1] == 'megatron' else 'Accelerate'}{method.upper()}Trainer"
        assert (config.model.peft_config is not None) == (names[1] == "lora")
        if hasattr(config.method, "chunk_size"):
            assert config.method.num_rollouts % (config.method.chunk_size * found.data) == 0
        if names[1] == "megatron":
            settings = settings_of(config)
            assert (settings.sizes.tensor, settings.sizes.pipeline) == (found.tensor, found.pipeline)
            shape = read_run(config.evolve(model={"model_path": shape_of(names[0])})).shape
            check_sizes(settings, shape, found.gpus, train.batch_size)


@pytest.mark.parametrize("method", [*METHODS, "rloo", "reinforce-pp"])
def test_every_method_goes_with_a_model(method):
    config = load_preset(method, "qwen3-8b", "lora", "8gpu")
    given, alone = config.method, load_preset(method).method
    assert config.optimizer.kwargs["lr"] == pytest.approx(10 * tables()["rates"][given.name])
    if "gen_kwargs" in vars(given):  # only the length of responses is another
        assert given.gen_kwargs == alone.gen_kwargs | {"max_new_tokens": 1024}
    if "num_rollouts" in vars(given):
        assert (given.num_rollouts, given.chunk_size) == (128, 16)
    if "eta_min" in config.scheduler.kwargs:
        assert config.scheduler.kwargs["eta_min"] == config.optimizer.kwargs["lr"]


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_the_parameters_that_its_authors_say(model):
    counted = on_paper(model).num_parameters()
    assert counted == pytest.approx(tables()["models"][model]["parameters"], rel=0.02)
    if "megatron" in layouts(model):
        run = read_run(load_preset("sft", model, "megatron").evolve(model={"model_path": shape_of(model)}))
        assert total_parameters(run.shape) == counted


def test_every_layout_fits_into_80_gb_by_plan():
    written = written_sizes()
    assert sorted(written) == sorted(LAYOUTS)
    assert {names: size for names, size in written.items() if size > 72} == {}


PLANNED_HERE = ("llama3.2-3b", "full", 16)
"""A layout on Accelerate, which takes a second; the slow test plans the others."""


def test_the_table_of_presets_is_up_to_date():
    written, sizes = PAGE.read_text(encoding="utf-8"), written_sizes()

    def size(*names):
        return planned_size(*names) if "megatron" in names or names == PLANNED_HERE else sizes[names]

    assert written.partition(MARK)[2] == page(size).partition(MARK)[2], "run: python -m docs.preset_tables"
    for preset, billions in (("megatron_1.3b", 0.81), ("megatron_2b", 1.41)):
        assert round(total_parameters(read_run(load_preset("sft", preset)).shape) / 1e9, 2) == billions
        assert re.search(rf"`{preset}` has {billions}\b", written)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_table_of_presets_shows_the_plan_of_every_layout():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_layers_stand_in_any_order_and_later_files_and_overrides_win(tmp_path):
    served = load_preset("grpo", "qwen3-4b", "vllm")
    assert (served.train.sampler, served.method.importance_cap) == ({"engine": "vllm"}, 2.0)
    assert load_preset("grpo", "8gpu", "lora", "qwen3-4b") == load_preset("grpo", "qwen3-4b", "lora", "8gpu")
    mine = tmp_path / "mine.yaml"
    mine.write_text("train: {batch_size: 4, seed: 3}\nmethod: {gen_kwargs: {top_k: 5}}")
    before, after = load_preset("grpo", mine, "gpt2", "1gpu"), load_preset("grpo", "gpt2", "1gpu", mine)
    assert [(each.train.batch_size, each.train.seed) for each in (before, after)] == [(64, 3), (4, 3)]
    assert {each.method.gen_kwargs["top_k"] for each in (before, after)} == {5}
    merged = preset_parts("grpo", "gpt2", "lora", mine)
    assert [each.name for each in merged if not isinstance(each, dict)] == ["grpo.yaml", "lora.yaml", "mine.yaml"]
    assert merged[2]["model"]["model_path"] == "gpt2"
    assert load_preset("grpo", "gpt2", "8gpu", overrides=["train.batch_size=2"]).train.batch_size == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ppo", "qwen3-8"], "Unknown preset 'qwen3-8'. Did you mean 'qwen3-8b'?"),
        (["ppo", "qwen3-8b", "lra"], "Unknown preset 'lra'. Did you mean 'lora'?"),
        (["qwen3-8b", "8gpu"], 'qwen3-8b has no method: write load_preset("ppo", "qwen3-8b", "8gpu")'),
        (["ppo", "8gpu"], '8gpu needs a model, e.g. load_preset("grpo", "qwen3-4b", "8gpu"). Known: gpt2, '),
        (["ppo", "gpt2", "qwen3-4b"], "gpt2 and qwen3-4b are several models: write one of them"),
        (["ppo", "gpt2", "1gpu", "8gpu"], "1gpu, 8gpu are several numbers of GPUs: write one of them"),
        (["ppo", "qwen3-32b", "8gpu"], "for 8 GPUs of 80 GB. There are: qwen3-32b megatron 16gpu, 64gpu"),
        (
            ["ppo", "gpt2", "lora", "32gpu"],
            "gpt2 lora has no layout for 32 GPUs of 80 GB. There are: gpt2 1gpu, 8gpu;",
        ),
        (["ppo", "qwen3-4b", "lora", "megatron"], "trains no adapters: leave out lora, or megatron"),
        (["rft", "gpt2", "megatron"], "The Megatron backend has no trainer for RFT: leave out megatron"),
        (["ppo", "gemma3-1b", "megatron"], "The Megatron backend does not support gemma3-1b: leave out megatron"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(names, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_preset(*names)


def test_the_sizes_of_a_model_are_found_by_both_its_names():
    assert shape_of("Qwen/Qwen3-8B").to_dict() == shape_of("qwen3-8b").to_dict()
    with pytest.raises(ConfigError, match="Unknown model 'Qwen/Qwen3-9B'. Did you mean 'Qwen/Qwen3-8B'?"):
        shape_of("Qwen/Qwen3-9B")


def test_a_preset_says_how_to_start_it(caplog):
    load_preset("ppo", "qwen3-8b", "8gpu")
    said = r"qwen3-8b 8gpu is made for 8 GPUs of 80 GB: accelerate launch --config_file (.*) --num_processes 8 YOUR"
    assert re.search(said, caplog.text).group(1).endswith("configs/accelerate/fsdp2.yaml")
    nodes = "--num_machines 8 --machine_rank $NODE --main_process_ip $HOST --main_process_port 29500"
    assert layout(["qwen3-8b", "64gpu"]).launch.endswith(f"--num_processes 64 {nodes}")
    where = "--rdzv-backend c10d --rdzv-endpoint $HOST:29500"
    assert layout(["qwen3-8b", "megatron", "16gpu"]).launch == f"torchrun --nnodes 2 --nproc-per-node 8 {where}"
    assert layout(["gpt2", "megatron", "1gpu"]).launch == "torchrun --nnodes 1 --nproc-per-node 1"


def test_a_megatron_preset_refuses_another_number_of_processes():
    config = load_preset("grpo", "qwen3-8b", "megatron", "16gpu").evolve(model={"model_path": shape_of("qwen3-8b")})
    with pytest.raises(ConfigError, match="trainer.devices 8 x trainer.num_nodes 2 = 16 processes, but 8 were started"):
        check_sizes(settings_of(config), read_run(config).shape, 8, config.train.batch_size)


def test_the_command_line_says_which_values_come_from_the_layers_of_a_preset():
    origins = typed(["ppo", "qwen3-8b", "megatron", "8gpu", "train.seed=3"], {}).origins
    wanted = {"train.trainer": "preset qwen3-8b megatron 8gpu", "train.seed": "command line"}
    wanted |= {"scheduler.kwargs.eta_min": wanted["train.trainer"], "train.epochs": "preset ppo"}
    assert {key: origins[key] for key in wanted} == wanted


def test_an_adapter_of_gemma_leaves_the_vision_tower_out_and_a_preset_trains(tmp_path):
    assert "exclude_modules" not in load_preset("grpo", "gemma3-1b", "lora").model.peft_config
    config = load_preset("grpo", "gemma3-4b", "lora", "8gpu")
    config = config.evolve(
        model={"model_path": tiny_gemma()},
        tokenizer={"tokenizer_path": char_tokenizer()},
        method={"num_rollouts": 8, "chunk_size": 8, "gen_kwargs": {"max_new_tokens": 4}},
        train={"batch_size": 8, "seq_length": 16, "total_steps": 1, "tracker": None, "checkpoint_dir": str(tmp_path)},
    )
    policy = trlx.train(config=config, **DATA["GRPO"]).backend.policy
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 7 and all("lora" in name for name in trained)
    assert not any("vision" in name for name in trained)
    assert any("vision_tower" in name for name, _ in policy.named_parameters())


def tiny_gemma():
    """Gemma-3 with a vision tower and one layer of text."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
    images = {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **images)
