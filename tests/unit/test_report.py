import base64
import json

import pytest

from trlx.launch.cli import main
from trlx.launch.report import read_metrics, write_report


def write_lines(path, rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)


@pytest.fixture
def run(tmp_path):
    evaluations = [{"step": step, "reward/mean": step / 10, "metrics/hops": 9.0 - step} for step in (0, 4, 8)]
    steps = [
        {"step": step, "losses/total_loss": 1 / step, "policy/kl": None if step == 2 else 0.5} for step in range(1, 9)
    ]
    write_lines(tmp_path / "metrics.jsonl", evaluations[:1] + steps + evaluations[1:])
    write_lines(tmp_path / "samples" / "eval_00000000.jsonl", [{"prompt": "old", "output": "old", "reward": 0.0}])
    write_lines(tmp_path / "samples" / "eval_00000008.jsonl", [{"prompt": "<b>", "output": "x & y", "reward": 0.81234}])
    return tmp_path


def test_metrics_become_series_of_steps_and_values_without_what_was_not_finite(run):
    metrics = read_metrics(run)
    assert metrics["reward/mean"] == [(0, 0.0), (4, 0.4), (8, 0.8)]
    assert [step for step, _ in metrics["policy/kl"]] == [1, 3, 4, 5, 6, 7, 8]


def test_a_line_still_being_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == {"loss": [(1, 2.0)]}


def test_the_page_holds_its_picture_and_the_last_samples_with_markup_escaped(run):
    png, page = write_report(run, "A < B")
    text = page.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert base64.b64encode(png.read_bytes()).decode() in text
    assert "<title>A &lt; B</title>" in text
    assert '<td>&lt;b&gt;</td><td>x &amp; y</td><td class="number">0.8123</td>' in text
    assert "1 samples of the evaluation at step 8" in text
    assert "old" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_page_tells_first_highest_and_last_value_of_every_evaluation(run):
    text = write_report(run, "run")[1].read_text()
    numbers = "".join(f'<td class="number">{number}</td>' for number in (9, 9, 1))
    assert f"<td>metrics/hops</td>{numbers}" in text
    assert "Settings" not in text


def test_settings_are_shown_where_there_are_any(run):
    (run / "config.json").write_text('{"train": {"seed": 1234}}')
    assert "&quot;seed&quot;: 1234" in write_report(run, "run")[1].read_text()


def test_curves_that_are_the_same_share_one_label():
    from trlx.launch.curves import distinct

    same = [(0, 0.5), (4, 0.75)]
    curves = distinct({"reward/mean": same, "metrics/optimality": list(same), "metrics/hops": [(0, 3.0)]})
    assert curves == {"reward = optimality": same, "hops": [(0, 3.0)]}


def test_a_moving_mean_takes_the_neighbours_there_are():
    from trlx.launch.curves import moving_mean

    assert moving_mean((0.0, 3.0, 6.0, 12.0), 1) == [1.5, 3.0, 7.0, 9.0]


def test_a_run_without_evaluations_has_a_report_too(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "loss": 1.0 / step} for step in range(1, 50)])
    assert all(path.exists() for path in write_report(tmp_path, "run"))


def test_the_command_writes_the_report_and_prints_where(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.png"), str(run / "report.html")]


def test_the_command_says_which_folder_it_wants_where_there_are_no_metrics(tmp_path):
    with pytest.raises(SystemExit, match=r"no metrics\.jsonl in .*train\.checkpoint_dir"):
        main(["report", str(tmp_path)])
