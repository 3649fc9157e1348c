"""A layout's memory, traffic and waiting on paper, against numbers worked by hand."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.pipeline_bubble import predicted, replay
from docs.scaling_tables import MARK, page
from tests.builders import tiny_gpt2_config
from tests.unit.megatron_configs import ROOT
from trlx.__main__ import main
from trlx.backends.base import ModelNeeds
from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.settings import ParallelSizes, Recompute
from trlx.launch.plan.layouts import fit, fullest, launch_line
from trlx.launch.plan.memory import activations, cache, chunk_activations, in_flight, layer_activations, memory
from trlx.launch.plan.parameters import parameters, total_parameters
from trlx.launch.plan.run import TRAINERS, Run, read_config, read_run
from trlx.launch.plan.traffic import RING, Message, bubble, messages, traffic
from trlx.presets import load_preset
from trlx.registry import trainers
from trlx.strict import ConfigError

SHAPE = DecoderConfig(
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=4,
    max_position_embeddings=16,
    vocab_size=10,
    tied=True,
)
RUN = Run(shape=SHAPE, parallel=ParallelSizes(), rows=2, microbatches=4, length=16, response=8, divisor=4)


def changed(**changes) -> Run:
    return dataclasses.replace(RUN, **changes)


def test_a_layer_has_12_h_squared_and_13_h_weights():
    # queries, keys, values 3 h^2 + 3 h, projection h^2 + h, feed-forward 8 h^2 + 5 h, two norms 4 h
    assert parameters(RUN, 0).model == 4 * (12 * 64 + 13 * 8) + 12 * 8 + 16 * 8 + 2 * 8


def test_padding_of_the_vocabulary_is_held_but_is_no_parameter_of_the_model():
    assert parameters(RUN, 0).model - total_parameters(SHAPE) == (12 - 10) * 8


def test_tensor_ranks_divide_all_of_a_layer_but_norms_and_late_biases():
    two = changed(parallel=ParallelSizes(tensor=2))
    layer = (12 * 64 + 3 * 8 + 4 * 8) // 2 + 4 * 8 + 2 * 8
    # 10 tokens fill up to 16: 8 rows for each rank
    assert parameters(two, 0).model == 4 * layer + 8 * 8 + 16 * 8 + 2 * 8


def test_both_ends_of_a_pipeline_hold_a_tied_embedding():
    two = changed(parallel=ParallelSizes(pipeline=2))
    layers = 2 * (12 * 64 + 13 * 8)
    assert parameters(two, 0).model == layers + 12 * 8 + 16 * 8
    assert parameters(two, 1).model == layers + 2 * 8 + 12 * 8


def test_heads_stand_on_the_last_stage_and_targets_do_not_train():
    ilql = changed(parallel=ParallelSizes(pipeline=2), needs=ModelNeeds(value_head=True, q_heads=2))
    value, q = 8 * 16 + 16 + 16 + 1, 8 * 16 + 16 + (16 + 1) * 12
    assert parameters(ilql, 0).heads == 0
    assert (parameters(ilql, 1).heads, parameters(ilql, 1).trained_heads) == (value + 4 * q, value + 2 * q)


def test_only_the_top_layers_and_the_last_norm_train_where_the_rest_is_frozen():
    assert parameters(changed(unfrozen=1), 0).trained == 12 * 64 + 13 * 8 + 16
    assert parameters(changed(unfrozen=0), 0).trained == 0


def test_adam_in_bfloat16_takes_18_bytes_a_weight_with_the_gradient_and_the_reference_two_more():
    held = memory(changed(needs=ModelNeeds(reference=True)), 0)
    sizes = (held.weights, held.gradients, held.main_weights, held.moments, held.reference)
    assert sizes == tuple(n * parameters(RUN, 0).model for n in (2, 4, 4, 8, 2))
    assert held.lasting == (18 + 2) * parameters(RUN, 0).model


def test_a_distributed_optimizer_divides_main_weights_and_moments():
    held, shared = memory(changed(data=4), 0), memory(changed(data=4, distributed=True), 0)
    assert (held.main_weights, held.moments) == (4 * shared.main_weights, 4 * shared.moments)
    assert held.gradients == shared.gradients


@pytest.mark.parametrize(
    "parallel, inside, outside",
    [(ParallelSizes(), 24, 10), (ParallelSizes(tensor=2), 12, 10), (ParallelSizes(tensor=2, sequence=True), 12, 5)],
)
def test_a_layer_keeps_34_bytes_a_token_and_width_as_in_the_paper(parallel, inside, outside):
    run = changed(parallel=parallel, shape=dataclasses.replace(SHAPE, hidden_dropout=0.1))
    # one float per head by the kernel, mean and spread by two norms
    noted = 4 * 2 / parallel.tensor + 16 / run.sequence_split
    assert layer_activations(run) == 2 * 16 * (8 * (inside + outside) + noted)


def test_a_layer_that_is_computed_again_keeps_its_input_only():
    full = changed(recompute=Recompute("full", "uniform", 1))
    assert chunk_activations(full, 0) == [4 * (2 * 16 * 8 * 2)]
    pairs = changed(recompute=Recompute("full", "uniform", 2))
    assert chunk_activations(pairs, 0) == [2 * (2 * 16 * 8 * 2)]
    one = changed(recompute=Recompute("full", "block", 1))
    assert chunk_activations(one, 0) == [3 * layer_activations(RUN) + 2 * 16 * 8 * 2]


def test_stages_below_all_that_trains_keep_no_activations_and_get_no_gradients():
    four, layer = changed(parallel=ParallelSizes(pipeline=4), unfrozen=1), layer_activations(RUN)
    assert [activations(four, stage) for stage in range(4)] == [0, 0, 0, layer]
    sent = [sum(each.times for each in messages(four, stage) if each.kind == "send") for stage in range(4)]
    assert sent == [4, 4, 4, 0]
    two = changed(parallel=ParallelSizes(pipeline=2), unfrozen=3)
    assert [activations(two, stage) for stage in range(2)] == [2 * layer, 2 * layer]


def test_of_an_interleaved_stage_the_chunks_that_train_keep_activations():
    # its second chunk goes forward for two microbatches before it goes back for the first one
    run = changed(parallel=ParallelSizes(pipeline=2, virtual=2), unfrozen=3)
    assert run.trained_layers(0) == [0, 1] and run.trained_layers(1) == [1, 1]
    assert activations(run, 0) == 2 * layer_activations(RUN) and activations(run, 1) == 3 * layer_activations(RUN)


def test_the_first_of_four_stages_holds_four_microbatches_the_last_one():
    four = changed(parallel=ParallelSizes(pipeline=4), microbatches=8)
    assert [in_flight(four, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(changed(parallel=ParallelSizes(pipeline=4), microbatches=2), 0) == 2


def test_an_interleaved_stage_holds_more_by_the_factor_of_the_paper():
    # 1 + (p - 1) / (p v) of all layers' activations: p v + p - 1 chunks of L / (p v) layers
    run = changed(parallel=ParallelSizes(pipeline=2, virtual=2))
    assert in_flight(run, 0) * len(run.layers(0)) // 2 == 2 * 2 + 2 - 1
    assert run.layers(0) == [0, 2] and run.layers(1) == [1, 3]


def test_keys_and_values_of_one_token_are_two_vectors_a_layer():
    assert cache(changed(parallel=ParallelSizes(tensor=2, pipeline=2)), 0, rows=3, tokens=5) == 2 * 2 * 3 * 5 * 4 * 2


@pytest.mark.parametrize(
    "pipeline, virtual, microbatches, share",
    [(1, None, 4, 0), (2, None, 1, 1 / 2), (4, None, 5, 3 / 8), (4, 2, 8, 3 / 19)],
)
def test_the_bubble_is_what_filling_and_draining_take(pipeline, virtual, microbatches, share):
    run = changed(parallel=ParallelSizes(pipeline=pipeline, virtual=virtual), microbatches=microbatches)
    assert bubble(run) == pytest.approx(share)


def test_a_replayed_pipeline_of_equal_passes_waits_as_predicted():
    first = [("F", 1.0), ("F", 1.0), ("B", 2.0), ("F", 1.0), ("B", 2.0), ("B", 2.0)]
    last = [("F", 1.0), ("B", 2.0)] * 3
    assert 1 - 9 / replay([first, last]) == pytest.approx(predicted(2, 3)) == pytest.approx(1 / 4)


def test_a_replay_of_passes_that_wait_for_each_other_is_refused():
    with pytest.raises(ValueError, match="no order that a pipeline can run in"):
        replay([[("B", 1.0), ("F", 1.0)], [("F", 1.0), ("B", 1.0)]])


def test_a_layer_is_reduced_twice_forward_and_twice_backward():
    run = changed(parallel=ParallelSizes(tensor=2))
    state, number = 2 * 16 * 8 * 2, 4 * 2 * 8
    assert list(messages(run, 0)) == [
        Message("tensor", "all_reduce", state, 4 * 4 * 4),
        Message("tensor", "all_reduce", state, 4),  # the embedding
        Message("tensor", "all_reduce", number, 3 * 4),  # largest logit, sum of exponentials, chosen logit
        Message("tensor", "all_reduce", 2 * 8 * 8 * 2, 4),  # gradients of the states that are scored
    ]
    # a ring of two sends as many bytes as it reduces
    assert traffic(run, 0)["tensor"] == state * 68 + number * 12 + 256 * 4


def test_sequence_parallelism_sends_a_quarter_more_for_gathering_inputs_again():
    state, layers = 2 * 16 * 8 * 2, 4 * 4  # the layers of four microbatches
    of_layers = list(messages(changed(parallel=ParallelSizes(tensor=2, sequence=True)), 0))[:2]
    assert of_layers == [
        Message("tensor", "all_gather", state, layers * 6),
        Message("tensor", "reduce_scatter", state, layers * 4),
    ]
    # an all-reduce is worth two of either: 10 instead of 2 x 4
    assert RING == {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


def test_stages_send_every_microbatch_on_and_its_gradient_back():
    run = changed(parallel=ParallelSizes(pipeline=4))
    state = 2 * 16 * 8 * 2
    assert [traffic(run, stage)["pipeline"] for stage in range(4)] == [4 * state, 8 * state, 8 * state, 4 * state]
    assert [traffic(run, stage)["embedding"] for stage in range(4)] == [4 * 12 * 8, 0, 0, 4 * 12 * 8]


def test_data_ranks_reduce_float32_gradients_once_a_step():
    count = parameters(RUN, 0).model
    assert traffic(changed(data=4), 0)["data"] == 2 * 3 / 4 * 4 * count
    assert traffic(changed(data=4, distributed=True), 0)["data"] == 3 / 4 * (4 + 2) * count


def test_the_20b_preset_is_read_with_its_layout():
    run = read_run(read_config(["megatron_20b", "model.num_layers_unfrozen=-1"], "ppo"))
    assert (run.parallel, run.data, run.gpus) == (ParallelSizes(4, 1, None, True), 8, 32)
    assert (run.rows, run.microbatches, run.element, run.distributed, run.needs.reference) == (2, 4, 2, True, True)
    assert total_parameters(run.shape) == 44 * (12 * 6144**2 + 13 * 6144) + (50257 + 2048 + 2) * 6144


def test_a_folder_with_a_model_is_read(tmp_path):
    tiny_gpt2_config().save_pretrained(tmp_path)
    changes = ["train.trainer_kwargs.tensor_model_parallel_size=2", "optimizer.name=distributed_fused_adam"]
    run = read_run(read_config([str(tmp_path), *changes], "sft"), gpus=4)
    assert (run.shape.hidden_size, run.parallel.tensor, run.data, run.needs.value_head) == (32, 2, 2, False)
    assert run.distributed


def test_gpus_that_a_layout_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match="start a multiple of 32"):
        read_run(read_config(["megatron_65b"], "ppo"), gpus=48)


def test_a_method_without_a_nemo_trainer_is_refused():
    with pytest.raises(
        ValueError, match="no NeMo trainer for RFT: write one of PPO, GRPO, ILQL, SFT, DPO, KTO, Reward"
    ):
        read_run(load_preset("rft"))


def test_the_smallest_layout_that_fits_is_found():
    whole = fullest(RUN).total
    assert fit(RUN, 2, whole).parallel == ParallelSizes()
    smaller = fit(changed(data=2), 4, whole - 1)
    assert smaller.parallel == ParallelSizes(2, 1, None, True)
    assert smaller.data * smaller.rows * smaller.microbatches == 2 * 2 * 4
    assert fit(RUN, 2, 10) is None


def test_one_node_and_several_start_with_their_own_file():
    assert launch_line(4) == "sbatch --nodes=1 --gpus-per-node=4 examples/slurm/megatron_single_node.sbatch"
    assert launch_line(64) == "sbatch --nodes=8 --gpus-per-node=8 examples/slurm/megatron_multi_node.sbatch"


def test_the_plan_reads_what_the_trainer_of_a_method_needs():
    needs = read_run(read_config(["megatron_1.3b", "method.two_qs=false"], "ilql")).needs
    assert (needs.value_head, needs.q_heads, needs.reference, needs.dropout) == (True, 1, False, True)


@pytest.mark.parametrize(
    "method, settings, needs, response",
    [
        ("grpo", ["method.kl_coef=0.1"], ModelNeeds(reference=True, dropout=False), 100),
        ("grpo", ["method.kl_coef=0"], ModelNeeds(dropout=False), 100),
        ("dpo", [], ModelNeeds(reference=True, dropout=False), 1023),
        ("kto", [], ModelNeeds(reference=True, dropout=False), 1023),
        ("reward", [], ModelNeeds(score_head=True), 1),
    ],
)
def test_every_nemo_trainer_has_a_plan(tmp_path, method, settings, needs, response):
    tiny_gpt2_config().save_pretrained(tmp_path)
    length = ["train.seq_length=1024", *(["method.gen_kwargs.max_new_tokens=100"] if method == "grpo" else [])]
    for name in ("megatron_1.3b", str(tmp_path)):
        config = read_config([name, *length, *settings], method)
        run = read_run(config)
        assert (run.needs, run.response) == (needs, response)
        assert trainers.get(config.train.trainer) is TRAINERS[config.method.name]


def test_a_reward_model_has_a_score_and_neither_output_layer_nor_logits():
    untied = dataclasses.replace(SHAPE, tied=False)
    base = changed(shape=untied, parallel=ParallelSizes(2, 2, None, True))
    scored = dataclasses.replace(base, needs=ModelNeeds(score_head=True))
    whole, without = parameters(base, 1), parameters(scored, 1)
    # 10 tokens fill up to 16: 8 rows of the output layer on each tensor rank
    assert (whole.model - without.model, whole.trained - without.trained) == (8 * 8, 8 * 8)
    assert (without.heads, without.trained_heads) == (8, 8)
    assert parameters(base, 0) == parameters(scored, 0)
    assert total_parameters(untied) - total_parameters(untied, output_layer=False) == 10 * 8
    # the last norm keeps its input, mean and spread of half of the tokens; the score two states as float32
    layers = activations(scored, 1)
    held = memory(scored, 1)
    assert held.temporary == 2 * 16 * (8 * 2 + 8) / 2 + 2 * 8 * 4 and held.activations >= layers
    # all states are gathered, and nothing is reduced over the vocabulary
    of_last = [each for each in messages(scored, 1) if each.group == "tensor"]
    assert of_last[2:] == [
        Message("tensor", "all_gather", 2 * 16 * 8 * 2, 4),
        Message("tensor", "all_reduce", 4 * parameters(scored, 1).replicated),
    ]
    tied = dataclasses.replace(scored, shape=SHAPE)
    assert traffic(tied, 0)["embedding"] == 0 < traffic(dataclasses.replace(base, shape=SHAPE), 0)["embedding"]


def test_the_command_prints_every_stage_and_how_to_start(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # narrower than the tables, which a file gets whole
    assert main(["plan", "megatron_65b", "--gpus", "64", "--pp", "2", "--set", "model.num_layers_unfrozen=-1"]) == 0
    printed = capsys.readouterr().out
    assert "64 GPUs = 8 (tensor) x 2 (pipeline) x 4 (data), sequence parallel" in printed
    assert "stage weights weights dients weights moments rence vations   rary total" in printed
    assert "64.86 billion parameters, all of 80 layers trained" in printed
    assert "sbatch --nodes=8 --gpus-per-node=8 examples/slurm/megatron_multi_node.sbatch" in printed


@pytest.mark.parametrize(("name", "billions"), [("megatron_1.3b", "0.81"), ("megatron_2b", "1.41")])
def test_the_plan_says_how_large_presets_with_larger_names_are(capsys, name, billions):
    assert main(["plan", name]) == 0
    assert f"{name}: {billions} billion parameters" in capsys.readouterr().out


def test_a_layout_that_does_not_fit_comes_with_one_that_does(capsys):
    wide = ["--tp", "1", "--pp", "1", "--set", "model.num_layers_unfrozen=-1", "train.minibatch_size=1"]
    main(["plan", "megatron_20b", "--gpus", "32", *wide])
    assert "It does not fit into 80 GiB. 4 (tensor) x 1 (pipeline) would." in capsys.readouterr().out


def test_an_unknown_preset_is_an_error_without_a_traceback():
    with pytest.raises(SystemExit, match="trlx plan: Unknown preset 'megatron_21b'"):
        main(["plan", "megatron_21b"])


def test_the_tables_of_the_scaling_page_are_those_of_the_formulas():
    written = (ROOT / "docs" / "scaling.md").read_text()
    assert written.partition(MARK)[2] == page().partition(MARK)[2], "run: python -m docs.scaling_tables"


def test_the_scaling_page_shows_the_recorded_bubbles():
    written = (ROOT / "docs" / "scaling.md").read_text()
    results = json.loads(Path(ROOT / "benchmarks" / "results" / "pipeline_bubble.json").read_text())
    for step in results["steps"]:
        row = f"| {step['microbatches']} | {step['predicted']:.1%} | {step['replayed']['median']:.1%} |"
        assert row in written
