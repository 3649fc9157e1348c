import json
import random

import numpy as np
import pytest

import trlx
from examples.randomwalks import RandomWalks, pipeline, ppo_randomwalks, preferences_randomwalks
from examples.randomwalks.preferences_randomwalks import labelled, pairs, preferences
from trlx.launch import demo
from trlx.launch.cli import main
from trlx.launch.demo.tokenizer import letter_tokenizer


def hand_made_graph():
    """d <-> c -> b -> a, a shortcut d -> a, and e -> e from where nothing leads on."""
    task = RandomWalks(num_nodes=5, num_walks=0)
    task.edges = np.zeros((5, 5), dtype=bool)
    for start, end in ("ba", "cb", "cd", "dc", "da", "ee"):
        task.edges[ord(start) - ord("a"), ord(end) - ord("a")] = True
    return task


def test_shortest_walks_are_counted_in_nodes_and_letters_without_a_way_are_absent():
    assert hand_made_graph().shortest == {"a": 1, "b": 2, "c": 3, "d": 2}


def test_a_shortest_walk_scores_one_and_a_longer_one_its_share():
    # (10 - length) / (10 - shortest)
    assert hand_made_graph().optimality(["da", "cba", "dcba", "cda", "a"]) == [1.0, 1.0, 6 / 8, 1.0, 1.0]


def test_a_walk_that_breaks_the_rules_or_never_arrives_scores_zero():
    task = hand_made_graph()
    no_such_edge, never_arrives, no_letter, empty, stuck = "dba", "dcb", "d?a", "", "eea"
    assert task.optimality([no_such_edge, never_arrives, no_letter, empty, stuck]) == [0.0] * 5


def test_a_letter_that_is_no_node_is_not_taken_for_the_last_node():
    task = hand_made_graph()
    task.edges[4, 0] = True  # e -> a
    assert task.optimality(["ea", "?a", "za"]) == [1.0, 0.0, 0.0]


def test_a_walk_of_the_greatest_length_scores_zero_and_a_longer_one_no_less():
    assert hand_made_graph().optimality(["dcdcdcda", "dcdcdcdcba", "dcdcdcdcdcba"]) == [2 / 8, 0.0, 0.0]


def test_what_follows_the_goal_does_not_count_and_the_end_token_is_no_letter():
    assert hand_made_graph().reward_fn(["da</s>", "dabcx", "d</s>"], prompts=None) == [1.0, 1.0, 0.0]


def test_metrics_tell_arrival_from_optimality():
    metrics = hand_made_graph().metric_fn(["dcba", "dcb", "dcdcdcdcba"], outputs=None)
    assert metrics == {"optimality": [6 / 8, 0.0, 0.0], "arrived": [1.0, 0.0, 1.0]}


def test_random_walks_follow_edges_from_any_letter_but_the_goals_and_stop_there():
    task = RandomWalks()
    edges = {(task.letters[a], task.letters[b]) for a, b in np.argwhere(task.edges)}
    assert {walk[0] for walk in task.walks} == set(task.prompts) == set("bcdefghijklmnopqrstu")
    assert all(set(zip(walk, walk[1:], strict=False)) <= edges for walk in task.walks)
    assert all("a" not in walk[:-1] and (walk[-1] == "a" or len(walk) == 10) for walk in task.walks)
    assert not task.edges[0].any()
    assert len(task.walks) == 1000


def test_the_graph_is_the_originals_on_which_random_walks_score_about_a_third():
    task = RandomWalks()
    assert task.walks[:4] == ["sda", "fda", "ebjnbdtkna", "jnbjna"]
    assert np.mean(task.optimality(task.walks)) == pytest.approx(0.35151, abs=1e-5)


def test_the_mask_says_which_token_is_forbidden_after_which():
    forbidden = hand_made_graph().forbidden(vocab_size=8, eos_token_id=6)
    allowed = ~forbidden
    assert np.flatnonzero(allowed[3]).tolist() == [0, 2]  # d: a or c
    assert np.flatnonzero(allowed[0]).tolist() == [6]  # after the goal only the end
    assert np.flatnonzero(allowed[5]).tolist() == [0, 1, 2, 3, 4]  # after bos any letter


def test_a_letter_is_the_token_of_its_node_and_text_comes_back_unchanged(tmp_path):
    letter_tokenizer("abcd").save_pretrained(tmp_path)
    from trlx.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("dcba").input_ids == [3, 2, 1, 0]
    assert tokenizer.decode([3, 2, 1, 0]) == "dcba"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (4, 5, 6)
    assert tokenizer.decode([3, 0, 5], skip_special_tokens=True) == "da"


def test_more_nodes_than_letters_are_refused():
    with pytest.raises(ValueError, match="one letter a node"):
        RandomWalks(num_nodes=27)


@pytest.mark.parametrize(
    ("trainer", "layout", "first"),
    [("AcceleratePPOTrainer", {}, None), ("NeMoPPOTrainer", {"pipeline_model_parallel_size": 2}, "NeMoSFTTrainer")],
)
def test_where_there_is_no_walker_yet_it_is_taught_first_in_the_same_layout(
    trainer, layout, first, tmp_path, monkeypatch
):
    taught, trained = [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_randomwalks, "pretrain", lambda hparams: taught.append(hparams))
    monkeypatch.setattr(trlx, "train", lambda **given: trained.append(given["config"].train.trainer))
    changes = {"train.trainer": trainer, "train.trainer_kwargs": layout}
    ppo_randomwalks.main(changes)
    assert taught == [{"train": {"trainer": first, "trainer_kwargs": layout}} if first else None]
    walker = tmp_path / ppo_randomwalks.PRETRAINED
    walker.mkdir(parents=True)
    (walker / "config.json").write_text("{}")
    ppo_randomwalks.main(changes)
    assert (len(taught), trained) == (1, [trainer, trainer])


def test_judged_walks_are_pairs_of_the_better_and_the_worse_and_labels_of_the_good():
    pair = {"prompt": "d", "chosen": "a", "rejected": "cba"}  # 1 and 6 / 8
    assert pairs(hand_made_graph(), ["da", "cba", "dcba"]) == [pair, pair]
    rows = labelled(hand_made_graph(), ["dcba", "dcb"])
    assert [(row["completion"], row["label"]) for row in rows] == [("cba", True), ("cb", False)]


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_judged_walks_train_what_is_asked_for(method, tmp_path, monkeypatch):
    given = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preferences_randomwalks, "pretrain", lambda: given.append("taught"))
    monkeypatch.setattr(trlx, "train", lambda **arguments: given.append(arguments))
    preferences_randomwalks.main(method, {"train.seed": 7}, ["optimizer.kwargs.lr=0.5"])
    taught, arguments = given
    config = arguments["config"]
    assert (taught, config.train.seed, config.optimizer.kwargs["lr"]) == ("taught", 7, 0.5)
    assert config.method.name.lower() == f"{method}config" and len(arguments["samples"]) > 500
    assert ("eval_samples" in arguments, "metric_fn" in arguments) == (method != "kto", method != "reward")


def test_of_two_walks_the_one_closer_to_the_shortest_is_preferred():
    task = hand_made_graph()
    best, longer, broken = "cba", "cdcba", "ca"
    couples = [(longer, best), (best, longer), (longer, broken), (best, best)]
    pairs = [("ba", "dcba"), ("ba", "dcba"), ("dcba", "a")]
    assert preferences(task, couples) == [
        {"prompt": "c", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs
    ]


def test_a_shortened_walk_keeps_its_start():
    assert {pipeline.shortened("cdba", random.Random(seed)) for seed in range(20)} == {"cba", "cda", "cdb"}
    assert pipeline.shortened("b", random.Random(0)) == "b"


def test_the_pipeline_runs_every_stage(tmp_path, monkeypatch):
    walks = RandomWalks().walks  # a model that was taught for one step samples no walks that could be compared
    monkeypatch.setattr(pipeline, "sample_walks", lambda *_: sorted(walks))
    curves = pipeline.main(tmp_path, steps=1)
    assert [[step for step, _ in curve] for curve in curves.values()] == [[0, 1]] * 5
    assert list(curves) == ["PPO, true reward", "PPO, reward model", "GRPO, reward model", "DPO", "reward model"]
    assert (tmp_path / "pipeline.png").stat().st_size > 1000


@pytest.mark.parametrize("method, taught", [("ppo", True), ("grpo", True), ("ilql", False)])
def test_the_demo_prints_its_curve_where_the_report_is_and_what_to_type_next(
    method, taught, tmp_path, monkeypatch, capsys
):
    ran = []

    def learn(config):
        ran.append((config.method.name, config.train.seed, config.model.model_path))
        folder = tmp_path / method
        folder.mkdir()
        names = ("metrics/optimality@beta=0", "metrics/optimality@beta=1")
        curve = [{"step": step, names[0]: 0.1, names[1]: step / 2} for step in (0, 2)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in curve))

    monkeypatch.setattr(demo, "pretrain", lambda out, seed: out if seed == 5 else None)
    monkeypatch.setattr(demo, "learn_online", learn)
    monkeypatch.setattr(demo, "learn_offline", learn)
    assert main(["demo", "--method", method, "--out", str(tmp_path), "--seed", "5"]) == 0
    start = str(tmp_path / "pretrained") if taught else "gpt2"
    assert ran == [(f"{method.upper()}Config", 5, start)]
    printed = capsys.readouterr().out
    assert "step    2  1.000  " in printed and f"  {tmp_path / method / 'report.html'}\n" in printed
    assert f"  trlx generate {tmp_path / method} --prompt" in printed
