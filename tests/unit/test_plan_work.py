"""Operations, time and the cheapest changes of a run on paper, against numbers worked by hand."""

import dataclasses

import pytest

from trlx.__main__ import main
from trlx.config import TRLConfig
from trlx.launch.plan import tables
from trlx.launch.plan.changes import Verdict, cheapest, ladders_of
from trlx.launch.plan.nemo import phases, work
from trlx.launch.plan.run import read_config, read_run
from trlx.launch.plan.tables import GIB, Planner
from trlx.launch.plan.work import Gpu, Work, rows_of_a_step
from trlx.presets import load_preset
from trlx.strict import ConfigError

WORK = Work(
    rows=4, sampled=1, scored=2, kept=1, length=10, response=6, new=5, trained=3, frozen=5, output=7, heads=1, gpus=2
)
GPU = Gpu("small", half=1.0, single=0.25, speed=2.0, memory=1.0)


def test_a_weight_takes_2_operations_a_token_forward_and_6_where_it_trains():
    assert WORK.tokens == {"sampling": 10, "scoring": 20, "update": 40}
    assert WORK.flops == {
        "sampling": 2 * (8 * 10 + 7 * 5),
        "scoring": 2 * 2 * (8 * 10 + 8 * 6) - 2 * 5 * 10,  # of one of the two rows frozen blocks do not run
        "update": 4 * (10 * (6 * 3 + 2 * 5) + 6 * 6 * 8),
    }
    again = dataclasses.replace(WORK, again=2, passes_frozen=0)
    assert again.flops["update"] == 4 * (10 * 8 * 3 + 6 * 6 * 8)


def test_time_is_that_of_operations_or_of_reading_weights_for_each_token():
    seconds = dataclasses.replace(WORK, draws=3, read=4e9, bubble=0.5).seconds(GPU, 0.5)
    # 0.5 TFLOPS on each of 2 GPUs, half of the time waiting; 3 x 4 GB at 1 GB/s
    assert seconds == pytest.approx({"sampling": 12, "scoring": 412 / 0.5e12, "update": 2272 / 0.5e12}, rel=1e-9)
    assert dataclasses.replace(WORK, half=False).seconds(GPU, 0.5)["update"] == pytest.approx(2272 / 2 / 0.125e12)


def test_a_collection_is_sampled_once_for_all_passes_over_it():
    ppo = load_preset("ppo")  # ppo_epochs 4
    assert rows_of_a_step(ppo, 32, True, False) == {"rows": 32, "sampled": 8, "scored": 16}
    assert rows_of_a_step(ppo, 32, True, True) == {"rows": 32, "sampled": 8, "scored": 8}
    dpo = load_preset("dpo", overrides=["train.epochs=2"])
    assert rows_of_a_step(dpo, 32, True, False) == {"rows": 32, "sampled": 0, "scored": 16}
    rft = load_preset("rft", overrides=["method.start_percentile=0.7", "method.end_percentile=0.8"])
    assert rows_of_a_step(rft, 32, False, False) == {"rows": 32, "sampled": pytest.approx(32), "scored": 0}


def judged(settings):
    """A run of two phases of 100 bytes and a limit of 60. `a` and `b` lower one of them each, `slow` both."""
    sizes = [100 - 10 * settings.get("a", 0), 100 - settings.get("b", 0)]
    if "slow" in settings:
        sizes = [50, 50]
    if "model.peft_config" in settings:
        sizes = [10, 10]
    seconds = 1 + settings.get("a", 0) + settings.get("b", 0) / 100 + 20 * settings.get("slow", 0)
    return Verdict(max(sizes), sum(max(size - 60, 0) for size in sizes), seconds)


def test_the_mildest_change_of_each_kind_that_fits_is_found_and_the_cheapest_comes_first():
    a, b, nothing = [{"a": n} for n in (1, 2, 4, 8)], [{"b": n} for n in (20, 50)], [{"c": 1}]
    # neither alone is enough; together a=4 and b=50 are
    (both,) = cheapest([a, b, nothing], judged)
    assert (both.settings, both.verdict) == ({"a": 4, "b": 50}, Verdict(60, 0, 5.5))
    alone = cheapest([a, b, [{"slow": 1}], [{"model.peft_config": {"r": 1}}]], judged)
    # what changes the numbers of a run comes last, however fast it is
    assert [str(change) for change in alone] == ["a=4 b=50", "slow=1", "model.peft_config={r: 1}"]
    assert [str(change) for change in cheapest([a, b, [{"slow": 1}]], judged, count=1)] == ["slow=1"]
    assert cheapest([a, nothing], judged) == []


def test_changes_are_offered_where_they_are_possible():
    ppo = load_preset("ppo", overrides=["model.num_layers_unfrozen=-1", "train.batch_size=12"])
    names = [
        [str(value) for each in ladder for value in each.values()] for ladder in ladders_of(ppo, 12, 8, True, True)
    ]
    assert names[0] == ["fsdp2", "12"] and names[1] == ["selective", "True"] and names[2] == ["6", "3", "1"]
    assert names[3] == ["64", "32", "16", "8", "4", "2", "1"] and ["4", "2"] in names
    nemo = read_config(["megatron_20b"], "ilql")
    assert [next(iter(ladder[0])) for ladder in ladders_of(nemo, 2, 44, True, False)] == [
        "train.gradient_checkpointing",
        "train.minibatch_size",
        "model.num_layers_unfrozen",
    ]


def test_the_phases_of_a_layout_are_its_stages_at_their_worst():
    config = read_config(["megatron_65b", "model.num_layers_unfrozen=-1"], "ppo")
    run = read_run(config)
    found = {phase.name: phase for phase in phases(run, config)}
    assert list(found) == ["sampling", "scoring", "update", "save"]
    assert found["update"].total > found["scoring"].total > found["save"].total
    # 32 rows a data rank on 4 of them; the last stage draws
    step = work(run, config)
    assert (step.rows, step.gpus, step.frozen) == (config.train.batch_size * 4, 128, 0)
    assert step.trained + step.output == pytest.approx(64.9e9, rel=0.01)


@pytest.fixture
def no_hub(monkeypatch):
    def asked(name, **_):
        raise AssertionError(f"asked the hub for {name}")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", asked)


def test_a_composition_is_planned_as_train_reads_it_and_without_the_hub(no_hub, capsys):
    words = ["grpo", "gpt2", "8gpu", "train.batch_size=32", "--set", "train.seq_length=512"]
    assert main(["plan", *words, "--gpu", "rtx4090"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("grpo gpt2 8gpu: 0.12 billion parameters, 0.12 billion train")
    assert printed[1:3] == ["8 processes on Accelerate", "256 rows of at most 512 tokens per step; microbatches of 2"]
    assert printed[-1].startswith("All phases fit into 24 GiB")
    assert main(["plan", "gpt2", "megatron", "8gpu", "--method", "dpo"]) == 0
    assert "8 GPUs = 1 (tensor) x 1 (pipeline) x 8 (data)" in capsys.readouterr().out


def test_runs_of_one_model_are_rehearsed_once(no_hub):
    config = read_config(["sft", "gpt2", "lora", "train.seq_length=8"])
    planner = Planner(1, 50257, GIB, "ddp")
    planner(config)
    planner(TRLConfig.update(config, {"train.batch_size": 2}))
    assert len(planner.rehearsals) == 1


def test_a_run_is_divided_as_its_presets_say_unless_that_is_typed(no_hub, monkeypatch):
    asked = []

    def planner(gpus, vocabulary, limit, accelerate):
        def planned(config):
            asked.append((gpus, accelerate, config.model.peft_config is not None))
            raise ConfigError("that is enough")

        return planned

    monkeypatch.setattr(tables, "Planner", planner)
    for words in ("qwen3-8b 8gpu", "qwen3-8b lora 8gpu", "qwen3-8b 8gpu --gpus 4 --accelerate ddp"):
        with pytest.raises(SystemExit, match="that is enough"):
            main(["plan", "ppo", *words.split()])
    assert asked == [(8, "fsdp2", False), (8, "ddp", True), (4, "ddp", False)]


def test_what_names_no_method_stands_over_that_of_the_option(tmp_path, no_hub):
    (tmp_path / "mine.yaml").write_text("method: {name: ILQLConfig}\ntrain: {seed: 3}")
    mine, alone = read_config([str(tmp_path / "mine.yaml")]), read_config(["qwen3-8b"], "sft")
    assert (mine.method.name, mine.train.seed, alone.method.name) == ("ILQLConfig", 3, "SFTConfig")
    shape, fsdp = alone.model.model_path, read_config(["ppo", "qwen3-8b", "8gpu"])
    assert (shape.num_hidden_layers, fsdp.train.trainer) == (36, "AcceleratePPOTrainer")
    folder, typed = read_config([str(tmp_path)], "dpo"), read_config(["dpo", str(tmp_path)])
    assert (folder.train.trainer, typed.train.trainer) == ("NeMoDPOTrainer", "AccelerateDPOTrainer")
    assert folder.model.model_path == typed.model.model_path == str(tmp_path)
    assert read_config(["ppo"], model="Qwen/Qwen3-4B").model.model_path.hidden_size == 2560


def test_a_gpu_and_an_efficiency_that_do_not_exist_are_refused(capsys):
    for option, said in (("--gpu=h10", "Unknown GPU 'h10'"), ("--efficiency=4", "at most 1, got 4: write e.g. 0.4")):
        with pytest.raises(SystemExit) as end:
            raise SystemExit(main(["plan", "megatron_1.3b", option]))
        assert end.value.code and said in f"{capsys.readouterr().err} {end.value.code}"
