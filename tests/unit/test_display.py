"""What a run shows: on a terminal a bar that nothing tears, in a file lines that nothing wraps."""

from __future__ import annotations

import io
import logging
import re
import sys
from math import inf
from types import SimpleNamespace

import pytest

import trlx
from tests.builders import tiny_gpt2_config
from tests.runs import PROMPTS, length, run, tiny_config
from tests.unit.test_start import T5
from trlx.backends.accelerate import AccelerateBackend
from trlx.data.store import pass_order
from trlx.logging import get_logger
from trlx.run import display
from trlx.run.display import Display, print_samples


class Terminal(io.StringIO):
    """Both output streams, as long as a test looks at them."""

    def isatty(self):
        return True

    def lines(self):
        """What there is to see: a carriage return goes back to the start of its line, and what follows goes over it."""
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.getvalue())
        seen = []
        for line in text.split("\n"):
            cells = []
            for piece in line.split("\r"):
                cells[: len(piece)] = piece
            seen.append("".join(cells).rstrip())
        return seen


def terminal(monkeypatch):
    """From here on this process writes to a terminal. (A fixture is too early: pytest has streams for each phase.)"""
    screen = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, screen)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's: with any there, trlx prints nothing itself
    return screen


def test_a_bar_says_what_happens_between_steps_and_nothing_tears_it(monkeypatch, tmp_path):
    def reward(samples, **kwargs):
        get_logger("judge").warning("in between")
        return [0.0] * len(samples)

    screen = terminal(monkeypatch)
    trlx.train(config=tiny_config(tmp_path, "PPO"), metric_fn=length, reward_fn=reward, prompts=PROMPTS)
    written, lines = screen.getvalue(), screen.lines()
    for text in ("evaluating 0/4", "sampling 0/8", "sampling 4/8", "waiting for scores"):
        assert text in written
    assert re.search(r"8/8 \|.*, reward [0-9.e-]+, KL [0-9.e-]+, evaluated [0-9.e-]+, [0-9,]+ tokens/s\s", written)
    # lines of tables and messages stand alone
    assert [line for line in lines if line.startswith("Evaluation at step")] == [
        line for line in lines if "Evaluation at step" in line
    ]
    assert sum(line.startswith("┃ prompt ┃ output ┃ reward ┃ length ┃") for line in lines) == 3
    assert all(line.startswith(("┏", "┡")) and line.endswith(("┓", "┩")) for line in lines if "━" in line)
    assert lines.count("[WARNING] in between") == sum("in between" in line for line in lines) == 7
    # of the bar what is left is its end
    assert sum("tokens/s" in line for line in lines) == 1
    bar = display._Bar(0, 2000)
    bar.step("reward 0.123, KL 0.0123, loss -0.0123, evaluated 0.877, 12,345 tokens/s")
    bar.close()
    assert re.fullmatch(r"1/2000 \|.*\| 00:00<.*, 12,345 tokens/s", screen.lines()[-2])


def test_a_run_begins_with_what_runs_where_and_ends_with_what_came_of_it(caplog, tmp_path):
    trainer = run("PPO", tmp_path, model={"num_layers_unfrozen": 1}, train={"total_steps": 4})
    # a block of 12 x 32 x 32 weights and 13 x 32 biases and norms; the last norm; a value head of two layers
    trained = 12 * 32 * 32 + 13 * 32 + 2 * 32 + (32 * 64 + 64 + 64 + 1)
    frozen = 12 * 32 * 32 + 13 * 32 + 38 * 32 + 64 * 32
    assert trainer.backend.parameter_counts() == (trained, frozen)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("trlx")]
    begin = (
        "AcceleratePPOTrainer, step 0/4 (train.total_steps: 4)\n"
        f"  model    a new gpt2: {trained:,} parameters train, {frozen:,} are frozen\n"
        "  device   cpu, 1 process, float32\n"
        f"  folder   {tmp_path}"
    )
    best, step = trainer.best_reward, trainer.best_step
    end = (
        f"  best     reward {best:.4g} at step {step}: {tmp_path}/best_checkpoint/hf_model\n"
        f"  weights  {tmp_path}/checkpoint_4/hf_model"
    )
    assert messages[0] == begin
    assert re.fullmatch(rf"Done: step 4, after \d+:\d\d:\d\d\n{re.escape(end)}", messages[-1])


def test_the_last_line_comes_before_the_error_that_ends_a_run(caplog, monkeypatch, tmp_path):
    step, calls = AccelerateBackend.train_step, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no memory left")
        return step(self, *args)

    monkeypatch.setattr(AccelerateBackend, "train_step", failing)
    with pytest.raises(MemoryError):
        run("SFT", tmp_path)
    found = [re.match(r"step (\d/8): loss", record.getMessage()) for record in caplog.records]
    assert [match[1] for match in found if match] == ["1/8", "2/8"]


@pytest.mark.parametrize(("seconds", "steps"), [(inf, ["1/8", "8/8"]), (0.0, [f"{i}/8" for i in range(1, 9)])])
def test_without_a_terminal_there_are_lines_now_and_then(caplog, capsys, monkeypatch, tmp_path, seconds, steps):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", seconds)
    run("SFT", tmp_path)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("trlx")]
    found = [
        re.match(r"step (\d/8): loss [0-9.]+, [0-9,]+ tokens/s, \d:\d\d:\d\d left$", message) for message in messages
    ]
    assert [match[1] for match in found if match] == steps
    assert ("step 4/8: evaluating 4/8" in messages) == (seconds == 0)
    assert "\r" not in capsys.readouterr().err
    if not seconds:
        caplog.clear()
        run("RFT", tmp_path / "unknown", train={"total_steps": None, "epochs": 1})
        assert "step 1: reward " in caplog.text and "left" not in caplog.text


def test_tokens_per_second_count_all_the_time_since_the_step_before(monkeypatch):
    clock = iter([100.0, 104.0, 106.0])
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=clock.__next__))
    shown = Display(is_main=True)
    assert [shown.speed(tokens)["time/tokens_per_second"] for tokens in (40, 80)] == [10.0, 40.0]
    shown._take({"losses/loss": 0.5, "loss/else": 1.0, "policy/kl": 0.25})
    assert shown._beside() == "KL 0.25, loss 0.5, 20 tokens/s"  # 120 tokens in 6 seconds


def test_the_seconds_before_a_run_begins_are_none_of_its_own(monkeypatch):
    clock = iter([100.0, 200.0, 204.0])  # the trainer is built, learns, has done a step
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=clock.__next__))
    monkeypatch.setattr(display, "_introduction", lambda trainer: "")
    shown = Display(is_main=False)
    shown.begin(None)
    assert shown.speed(40) == {"time/tokens_per_second": 10.0, "time/elapsed": 4.0} and shown._beside() == "10 tokens/s"


@pytest.mark.parametrize("model_path", [tiny_gpt2_config(), T5], ids=["causal", "seq2seq"])
def test_a_steps_tokens_are_those_of_its_own_rows(monkeypatch, tmp_path, model_path):
    counted = []
    monkeypatch.setattr(Display, "speed", lambda self, tokens: counted.append(tokens) or {})
    dialogues = [["a", "b" * length] for length in (1, 2, 4, 8)]
    config = tiny_config(tmp_path, "SFT", model={"model_path": model_path}, train={"batch_size": 1, "total_steps": 4})
    trlx.train(config=config, samples=dialogues, eval_prompts=["a"])
    order = pass_order(4, config.train.seed, 0)
    # a prompt of one token, and an eos behind each output
    assert counted == [1 + (1, 2, 4, 8)[row] + 1 for row in order]


def test_a_table_in_a_file_has_a_line_for_each_row_however_long(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    rows = [["x[/b]", 0.123456], ["y" * 500, 2.0], ["two\nlines", 3.0], ["fourth", 4.0]]
    print_samples("Evaluation" * 20, ["prompt", "reward"], rows)
    title, top, head, _, first, second, third, _ = capsys.readouterr().out.splitlines()
    assert title == "Evaluation" * 20
    assert len({len(line) for line in (top, head, first, second, third)}) == 1
    assert first.split() == ["│", "x[/b]", "│", "0.1235", "│"]
    assert second.split() == ["│", "y" * 100 + "…", "│", "2", "│"]
    assert third.split() == ["│", "two\\nlines", "│", "3", "│"]


def test_a_table_on_a_terminal_is_folded_and_long_cells_are_shortened(monkeypatch):
    screen = terminal(monkeypatch)
    print_samples("Evaluation", ["prompt", "reward"], [["y" * 500, 0.123456]])
    assert screen.getvalue().count("y") == 240
    assert max(map(len, screen.lines())) <= 100


def test_only_the_main_process_prints_a_table(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    print_samples("Evaluation", ["prompt"], [["a"]])
    assert capsys.readouterr().out == ""
