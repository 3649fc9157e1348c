"""What the report page says about runs, and what it does in a browser."""

import json
import logging
import shutil
import sys
import time
from html import escape, unescape
from html.parser import HTMLParser

import pytest

from docs.pictures import BROWSERS, browser, drive
from trlx.config import flat
from trlx.launch.cli import main
from trlx.launch.report import write_report, write_reports
from trlx.report import reporter
from trlx.report.page import write_page
from trlx.report.records import MOST_POINTS, Record, read_metrics, thinned
from trlx.report.reporter import Reporter


def write_lines(path, rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)


@pytest.fixture
def run(tmp_path):
    """A PPO run of eight steps: evaluated at 0, 4 and 8, started twice (the second time after step 4)."""
    folder = tmp_path / "run"
    evaluations = [{"step": step, "reward/mean": step / 10, "metrics/hops": 9.0 - step} for step in (0, 4, 8)]
    steps = [
        {
            "step": step,
            "losses/total_loss": 1 / step,
            "policy/kl": None if step == 2 else step - 1.0,
            "rollout_scores/mean": 10.0 * step,
            "time/tokens_per_second": 100.0 if step <= 4 else 400.0,
            "time/elapsed": 10.0 * step if step <= 4 else 5.0 * (step - 4),
        }
        for step in range(1, 9)
    ]
    write_lines(folder / "metrics.jsonl", evaluations[:1] + steps + evaluations[1:])
    for step, output in ((0, "old"), (8, "x & y")):
        rows = [{"prompt": "<b>", "output": output, "reward": 0.81234}, {"prompt": "</script>", "output": "z"}]
        write_lines(folder / "samples" / f"eval_{step:08d}.jsonl", rows)
    write_lines(folder / "samples" / "rollout_00000003.jsonl", [{"prompt": "p", "response": "r", "score": 2.0}])
    for step, high, counts in ((0, 8.0, [1, 0, 2, 1]), (4, 1.0, [4])):
        rows = [{"name": "scores", "low": min(high, 4.0), "high": high, "counts": counts}]
        write_lines(folder / "samples" / f"histogram_{step:08d}.jsonl", rows)
    (folder / "config.json").write_text('{"train": {"seed": 1, "checkpoint_dir": "run"}, "method": {"gamma": 1.0}}')
    write_lines(folder / "alarms.jsonl", [{"step": 3, "time": "2026-01-02T03:04:05", "message": "KL is <high>"}] * 2)
    starts = [{"started": f"2026-01-02T0{hour}:00:00", "git": f"main/{hour}", "torch": "2.9"} for hour in (3, 5)]
    write_lines(folder / "environment.jsonl", starts)
    return folder


@pytest.fixture
def other(run, tmp_path):
    """A run like `run` with another seed, which has no evaluations, alarms or environment."""
    folder = tmp_path / "other"
    write_lines(folder / "metrics.jsonl", [{"step": step, "losses/total_loss": 2.0} for step in range(1, 9)])
    (folder / "config.json").write_text('{"train": {"seed": 2, "checkpoint_dir": "other"}, "method": {"gamma": 1.0}}')
    return folder


def many_runs(folder):
    """30 runs of two steps; trial k earns k at the last one, with a learning rate that belongs to it."""
    runs = [folder / f"trial {number}" for number in range(30)]
    for number, run in enumerate(runs):
        write_lines(run / "metrics.jsonl", [{"step": step, "reward/mean": number * step} for step in (0, 1)])
        (run / "config.json").write_text(json.dumps({"optimizer": {"lr": number / 1000}, "train": {"seed": 1}}))
    return runs


class Page(HTMLParser):
    """The tables of a page (rows of texts), the data of its script, and the addresses that it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.data, self.addresses = [], None, []
        self.is_data = self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        self.is_data = ("id", "data") in attributes
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.in_cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self.in_cell = False

    def handle_data(self, text):
        if self.is_data:
            self.data, self.is_data = json.loads(text), False
        elif self.in_cell:
            self.tables[-1][-1][-1] += text


def test_metrics_become_series_of_steps_and_values_without_what_was_not_finite(run):
    metrics = read_metrics(run)
    assert metrics["reward/mean"] == [(0, 0.0), (4, 0.4), (8, 0.8)]
    assert [step for step, _ in metrics["policy/kl"]] == [1, 3, 4, 5, 6, 7, 8]


def test_a_line_still_being_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == {"loss": [(1, 2.0)]}


def test_a_long_series_keeps_its_ends_and_its_highest_and_lowest_values():
    series = [(step, float(step % 7)) for step in range(100 * MOST_POINTS)]
    series[12345], series[-5] = (12345, 99.0), (series[-5][0], -99.0)
    kept = thinned(series)
    assert MOST_POINTS // 2 < len(kept) <= MOST_POINTS + 1
    assert {series[12345], series[-5], series[-1]} <= set(kept) and kept == sorted(kept)
    assert thinned(series[:10]) == series[:10]


def test_duration_and_speed_are_those_of_all_starts_together(run):
    record = Record.of(run, "run")
    assert record.clock[3:6] == [(4, 40.0), (5, 45.0), (6, 50.0)]
    assert record.tokens_per_second == pytest.approx((40 * 100 + 20 * 400) / 60)


def test_the_page_of_a_run_tells_its_numbers_alarms_and_environment(run):
    png, path = write_report(run, "A < B")
    text = path.read_text()
    page = Page(text)
    assert png.read_bytes().startswith(b"\x89PNG") and (png.name, path.name) == ("report.png", "report.html")
    assert "<title>A &lt; B</title>" in text
    overview, headline, alarms, environment = page.tables
    assert overview == [
        ["run", "step", "began", "starts", "duration", "tokens/s", "alarms"],
        ["run", "8", "2026-01-02 03:00:00", "2", "0:01:00", "200", "3"],
    ]
    assert headline[1:] == [["reward/mean", "0", "0", "0.8", "0.8"], ["metrics/hops", "9", "1", "9", "1"]]
    assert alarms[1:] == [
        ["2", "", "1", "policy/kl was not a finite number"],
        ["3", "2026-01-02 03:04:05", "2", "KL is <high>"],
    ]
    assert environment[1:] == [["started", "2026-01-02T05:00:00"], ["git", "main/5"], ["torch", "2.9"]]
    assert page.addresses == []
    assert "&quot;gamma&quot;: 1.0" in text and "Settings that differ" not in text


def test_the_page_holds_every_metric_and_the_samples_of_all_steps(run):
    data = Page(write_page([run]).read_text()).data
    drawn = data["runs"][0]
    steps, values = drawn["metrics"]["rollout_scores/mean"]
    assert (drawn["steps"][steps], values) == ([*range(1, 9)], [10.0 * step for step in range(1, 9)])
    assert drawn["metrics"].keys() == read_metrics(run).keys()
    assert data["shown"] == ["reward/mean", "metrics/hops", "rollout_scores/mean", "policy/kl", "losses/total_loss"]
    assert [(each["kind"], each["step"]) for each in drawn["samples"]] == [("eval", 0), ("eval", 8), ("rollout", 3)]
    assert drawn["histograms"] == {"scores": [[0, 4.0, 8.0, [1, 0, 2, 1]], [4, 1.0, 1.0, [4]]]}
    assert drawn["samples"][1]["rows"] == [["<b>", "x & y", 0.81234], ["</script>", "z", None]]


def test_of_many_evaluations_the_page_holds_twenty_and_of_long_texts_the_beginning(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    for step in range(50):
        rows = [{"prompt": "p" * 3000, "output": number} for number in range(50)]
        write_lines(tmp_path / "samples" / f"eval_{step:08d}.jsonl", rows)
    samples = Record.of(tmp_path, "run").samples
    assert len(samples) == 20 and (samples[0]["step"], samples[-1]["step"]) == (0, 49)
    assert {len(each["rows"]) for each in samples} == {40}
    assert samples[0]["rows"][0] == ["p" * 2000 + "…", 0]
    assert [len(each["rows"]) for each in Record.of(tmp_path, "run", runs=10).samples] == [4, 4]


def test_a_run_that_only_has_a_loss_has_nothing_empty(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "loss": 1.0 / step} for step in range(1, 50)])
    written = write_report(tmp_path, "run")
    overview, headline = Page(written[-1].read_text()).tables
    assert overview == [["run", "step", "alarms"], [tmp_path.name, "49", "0"]]
    assert headline[1] == ["loss", "1", "0.02041", "1", "0.02041"]
    for heading in ("Alarms", "Environment", "Settings"):
        assert f">{heading}" not in written[-1].read_text()


def test_several_runs_share_a_page_that_tells_which_settings_differ(run, other, tmp_path):
    assert write_reports([run, other]) == (tmp_path / "reports.html",)
    page = Page((tmp_path / "reports.html").read_text())
    assert [each["name"] for each in page.data["runs"]] == ["run", "other"]
    overview, alarms, environment = page.tables
    assert overview == [
        "run train.seed reward/mean metrics/hops step began starts duration tokens/s alarms".split(),
        ["run", "1", "0.8", "1", "8", "2026-01-02 03:00:00", "2", "0:01:00", "200", "3"],
        ["other", "2", "", "", "8", "", "", "", "", "0"],
    ]
    assert environment[0] == ["last starts", ""]
    (other / "config.json").write_text(json.dumps({"method": {str(number): number for number in range(9)}}))
    overview, differences, *_ = Page(write_page([run, other]).read_text()).tables
    assert overview[0][1] == "reward/mean" and differences[:2] == [["", "run", "other"], ["train.seed", "1", ""]]


def test_runs_in_folders_of_one_name_are_told_apart_by_the_folders_above(run, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name / "ppo")
    (path,) = write_reports([tmp_path / "a" / "ppo", tmp_path / "b" / "ppo"], "Two", tmp_path / "new" / "page.html")
    assert [each["name"] for each in Page(path.read_text()).data["runs"]] == ["a/ppo", "b/ppo"]
    with pytest.raises(ValueError, match="named twice"):
        write_reports([run, run])
    with pytest.raises(ValueError, match="at least one run"):
        write_reports([])


def test_without_matplotlib_there_is_a_page_and_no_picture(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report(run, "run") == (run / "report.html",)


def test_settings_are_compared_by_their_dotted_names():
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


def test_while_a_run_goes_on_its_page_follows_at_a_small_share_of_its_time(tmp_path, monkeypatch):
    now, written = [100.0], []

    def write(folders):
        written.append(now[0])
        now[0] += 0.5
        return write_page(folders)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(reporter, "write_page", write)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    watcher = Reporter(tmp_path)
    for now[0] in (101.0, 111.0, 130.0, 161.0, 162.0):
        watcher.log({"loss": 2.0}, int(now[0]))
    assert written == [111.0, 162.0]  # 10 s after the start; a page of 0.5 s is written again after 50 s
    logging.getLogger("trlx.somewhere").warning("careful: %s", "é")
    logging.getLogger("trlx.somewhere").info("nothing")
    watcher.close()
    logging.getLogger("trlx.somewhere").warning("after the end")
    (alarm,) = Record.of(tmp_path, "run").alarms
    assert (alarm["step"], alarm["message"]) == (162, "careful: é")
    (start,) = Record.of(tmp_path, "run").starts
    assert {"started", "command", "CPUs", "memory", "torch", "trlx"} <= start.keys() and all(start.values())
    assert len(written) == 3 and "careful: é" in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_a_warning_and_no_error(tmp_path, caplog):
    watcher = Reporter(tmp_path / "missing")
    watcher.close()
    (record,) = caplog.records
    assert record.getMessage().startswith("The run goes on without its report page: FileNotFoundError")


def test_the_command_writes_the_report_and_prints_where(run, other, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.png"), str(run / "report.html")]
    assert main(["report", str(run), str(other), "--title", "Two", "--out", str(tmp_path / "two.html")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "two.html")]


def test_the_command_says_which_folder_it_wants_where_there_are_no_metrics(tmp_path):
    with pytest.raises(SystemExit, match=r"no metrics\.jsonl in .*train\.checkpoint_dir"):
        main(["report", str(tmp_path)])


def test_curves_that_are_the_same_share_one_label():
    from trlx.launch.curves import distinct

    same = [(0, 0.5), (4, 0.75)]
    curves = distinct({"reward/mean": same, "metrics/optimality": list(same), "metrics/hops": [(0, 3.0)]})
    assert curves == {"reward = optimality": same, "hops": [(0, 3.0)]}


def test_a_moving_mean_takes_the_neighbours_there_are():
    from trlx.launch.curves import moving_mean

    assert moving_mean((0.0, 3.0, 6.0, 12.0), 1) == [1.5, 3.0, 7.0, 9.0]


DRIVER = """<!doctype html><body>
<iframe style="width: 1280px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<iframe style="width: 390px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<iframe style="width: 390px; height: 900px; border: 0" srcdoc="{many}"></iframe>
<pre id="told"></pre>
<script>
addEventListener("load", async () => {{
  const told = {{}};
  try {{
    const [wide, narrow, many] = [...document.querySelectorAll("iframe")].map((frame) => frame.contentWindow);
    const page = wide.document, all = (selector) => [...page.querySelectorAll(selector)];
    const texts = (selector) => all(selector).map((each) => each.textContent);
    const change = (each, value) => {{ each.value = value; each.onchange ? each.onchange() : each.oninput(); }};
    const card = (name) => all(".card").find((each) => each.querySelector("b")?.textContent === name);
    told.overflow = [wide, narrow, many].map((frame) => frame.document.documentElement.scrollWidth > frame.innerWidth);
    told.columns = [wide, narrow].map((frame) =>
      frame.getComputedStyle(frame.document.getElementById("grid")).gridTemplateColumns.split(" ").length);
    told.charts = texts("#grid .card b");
    told.canvases = all("#grid canvas").filter((canvas) => canvas.width > 100).length;
    told.last = card("losses/total_loss").querySelector(".readout").textContent;
    page.querySelector('#chooser input[name="time/elapsed"]').click();
    told.chosen = !!card("time/elapsed");
    card("reward/mean").querySelector("button").click();
    told.closed = !card("reward/mean");
    card("losses/total_loss").querySelector('input[name="log"]').click();
    const mouse = (name, kind, share) => {{
      const over = card(name).querySelector(".u-over"), box = over.getBoundingClientRect();
      const place = {{ clientX: box.left + share * box.width, clientY: box.top + 50, bubbles: true, movementX: 1 }};
      (kind === "mouseup" ? page : over).dispatchEvent(new wide.MouseEvent(kind, place));
    }};
    const drawn = () => new Promise((done) => setTimeout(done, 50));
    const ends = () => ["from", "to"].map((id) => page.getElementById(id).value);
    const hovered = (share) => {{
      mouse("policy/kl", "mouseenter", share);
      mouse("policy/kl", "mousemove", share);
      return card("policy/kl").querySelector(".readout").textContent;
    }};
    told.hover = hovered(0.01);
    mouse("policy/kl", "mousedown", 0.5);
    mouse("policy/kl", "mousemove", 0.9);
    mouse("policy/kl", "mouseup", 0.9);
    told.dragged = ends().map(Number);
    page.getElementById("to").value = "6";
    change(page.getElementById("from"), "4");
    await drawn();
    told.zoomed = hovered(0.01);
    page.getElementById("whole").click();
    told.whole = ends();
    page.querySelector('#legend input[name="other"]').click();
    told.hidden = card("losses/total_loss").querySelector(".readout").textContent;
    change(page.getElementById("x"), "hours");
    told.hours = card("losses/total_loss").querySelector(".readout").textContent;
    told.kl = page.querySelector("#kl canvas") !== null;
    told.histogram = [card("scores").querySelector(".readout").textContent];
    mouse("scores", "mouseenter", 0.3);
    mouse("scores", "mousemove", 0.3);
    told.histogram.push(card("scores").querySelector(".readout").textContent);
    const runs = () => [...many.document.querySelectorAll("#runs tbody tr")].map((row) => row.cells[0].textContent);
    const head = [...many.document.querySelectorAll("#runs th")].find((cell) => cell.textContent === "reward/mean");
    head.click();
    told.highest = runs().slice(0, 2);
    head.click();
    told.lowest = runs().slice(0, 2);
    told.colors = new Set([...many.document.querySelectorAll("#legend label")].map((each) => each.style.color)).size;
    told.readout = many.document.querySelector(".readout").textContent;
    told.samples = texts("#rows tbody tr");
    change(page.getElementById("search"), "OLD");
    told.searched_last = texts("#rows tbody tr");
    change(page.getElementById("step"), "all");
    told.searched_all = texts("#rows tbody tr");
    change(page.getElementById("search"), "");
    page.querySelector("#rows td.sorts").click();
    told.followed = texts("#rows tbody tr");
    change(page.getElementById("search"), "");
    change(page.getElementById("kind"), "rollout");
    told.rollouts = texts("#rows tbody tr");
  }} catch (error) {{ told.error = String(error.stack); }}
  document.getElementById("told").textContent = JSON.stringify(told);
}});
</script></body>"""


def test_in_a_browser_charts_and_samples_do_what_their_controls_say(run, other, tmp_path):
    if browser() is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    driver = tmp_path / "driver.html"
    page, many = write_page([run, other]).read_text(), write_page(many_runs(tmp_path / "many")).read_text()
    driver.write_text(DRIVER.format(page=escape(page), many=escape(many)))
    shown = drive(driver, "--dump-dom")
    told = json.loads(unescape(shown.partition('<pre id="told">')[2].partition("</pre>")[0]))
    assert told == {
        "overflow": [False, False, False],
        "columns": [3, 1],
        "charts": ["reward/mean", "metrics/hops", "rollout_scores/mean", "policy/kl", "losses/total_loss"],
        "canvases": 5,
        "last": "run 0.125 step 8other 2 step 8",
        "chosen": True,
        "closed": True,
        "hover": "run 0 step 1",
        "dragged": pytest.approx([4.5, 7.3], abs=0.1),  # steps 1 to 8
        "zoomed": "run 3 step 4",
        "whole": ["", ""],
        "hidden": "run 0.125 step 8",
        "hours": "run 0.125 0.01667 h",
        "kl": True,
        "histogram": ["4 from 1 to 1 step 4", "4 from 4 to 8, 2 from 6 to 7 step 0"],
        "highest": ["trial 29", "trial 28"],
        "lowest": ["trial 0", "trial 1"],
        "colors": 30,
        "readout": "".join(f"trial {number} {number} " for number in range(29, 23, -1)) + "6 of 30, step 1",
        "samples": ["run8<b>x & y0.8123", "run8</script>z"],
        "searched_last": [],
        "searched_all": ["run0<b>old0.8123"],
        "followed": ["run0<b>old0.8123", "run8<b>x & y0.8123"],
        "rollouts": ["run3pr2"],
    }
