"""What a run shows on its terminal."""

from __future__ import annotations

from trlx.trainer.display import print_samples


def test_a_table_shows_the_first_rows_with_long_cells_shortened(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    rows = [["x[/b]", 0.123456], ["y" * 500, 2.0], ["third", 3.0], ["fourth", 4.0]]
    print_samples("Evaluation", ["prompt", "reward"], rows)
    shown = capsys.readouterr().out
    assert "x[/b]" in shown
    assert "0.1235" in shown
    assert shown.count("y") == 240
    assert "third" in shown
    assert "fourth" not in shown


def test_only_the_main_process_prints_a_table(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    print_samples("Evaluation", ["prompt"], [["a"]])
    assert capsys.readouterr().out == ""
