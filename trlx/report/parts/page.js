"use strict";
/* Draws charts, histograms and samples from the element #data, see _script in page.py. Nothing is fetched. */
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A51A3", "#8C6D31"];
  const MOST_ROWS = 60, MOST_TOLD = 6;
  const RUNS = DATA.runs.map((run, number) => ({ ...run, number, color: DATA.runs.length > COLORS.length ? hue(number) : COLORS[number] }));
  const METRICS = [...new Set(RUNS.flatMap((run) => Object.keys(run.metrics)))].sort();
  const KEY = `trlx-report:${DATA.title}`;
  const state = { shown: DATA.shown, log: [], smooth: 0, x: "step", range: null, hidden: [], ...remembered() };
  state.shown = state.shown.filter((name) => METRICS.includes(name));

  /** Colours for more runs than have names: steps of the golden angle, in two shades. */
  function hue(number) {
    const [angle, light] = [(number * 137.508) % 360, number % 2 ? 0.32 : 0.44];
    return "#" + [0, 8, 4].map((part) => {
      const k = (part + angle / 30) % 12, value = light - 0.65 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1));
      return Math.round(255 * value).toString(16).padStart(2, "0");
    }).join("");
  }
  function remembered() {
    try { return JSON.parse(localStorage.getItem(KEY)) || {}; } catch { return {}; }
  }
  function remember() {
    try { localStorage.setItem(KEY, JSON.stringify({ ...state, range: null })); } catch { /* a page of a file */ }
  }

  // elements

  function element(tag, attributes = {}, ...children) {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children.filter((child) => child !== null));
    return made;
  }
  function labelled(text, control) { return element("label", {}, text, " ", control); }
  function select(options, value, onchange, id) {
    const made = element("select", { id, onchange: () => onchange(made.value) });
    made.append(...options.map(([key, text]) => element("option", { value: key, textContent: text })));
    made.value = value;
    return made;
  }
  function checkbox(checked, onchange, name = "") {
    const made = element("input", { type: "checkbox", checked, name, onchange: () => onchange(made.checked) });
    return made;
  }
  function short(value) {
    if (value === null || value === undefined) return "";
    if (typeof value !== "number") return String(value);
    return String(+value.toPrecision(4));
  }

  // numbers

  function series(run, name) {
    const found = run.metrics[name];
    return found ? [run.steps[found[0]], found[1]] : [[], []];
  }
  /** Hours that the run had taken at a step, between the steps whose hours are known. */
  function hours(run, step) {
    const clock = run.clock;
    if (!clock.length || step >= clock[clock.length - 1][0]) return clock.length ? clock[clock.length - 1][1] / 3600 : 0;
    let low = 0, high = clock.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (clock[middle][0] < step) low = middle + 1; else high = middle;
    }
    const [from, began] = low ? clock[low - 1] : [0, 0];
    const [to, ended] = clock[low];
    return (began + (ended - began) * (to > from ? Math.max(step - from, 0) / (to - from) : 1)) / 3600;
  }
  /** Exponential mean that is not drawn to 0 at the start. */
  function smoothed(values, weight) {
    let sum = 0, weights = 0;
    return values.map((value) => {
      sum = sum * weight + value * (1 - weight);
      weights = weights * weight + (1 - weight);
      return sum / weights;
    });
  }
  /** [place, distance] of the entry of ascending `steps` that is nearest to `step`. */
  function nearest(steps, step) {
    let best = 0;
    steps.forEach((each, place) => { if (Math.abs(each - step) < Math.abs(steps[best] - step)) best = place; });
    return best;
  }
  function visible(run) { return !state.hidden.includes(run.name); }
  /** Several lines over one x axis, as uPlot wants them. A line is [xs, ys]. */
  function joined(lines) {
    const found = lines.filter((line) => line[0].length);
    return found.length ? uPlot.join(found) : [[], ...lines.map(() => [])];
  }

  // charts

  const charts = new Map();  // metric -> {box, plot}
  const resize = new ResizeObserver((entries) => entries.forEach((entry) => {
    const chart = [...charts.values()].find((each) => each.place === entry.target);
    if (chart && chart.plot && entry.contentRect.width > 0) {
      chart.plot.setSize({ width: Math.floor(entry.contentRect.width), height: chart.plot.height });
    }
  }));

  function axes(xLabel) {
    const common = { stroke: "#666", grid: { stroke: "#eee", width: 1 }, ticks: { stroke: "#ddd", width: 1 }, font: "11px system-ui" };
    return [
      { ...common, ...(xLabel && { label: xLabel, labelSize: 16, labelFont: "11px system-ui" }), size: 30, space: 60 },
      { ...common, size: 54, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))) },
    ];
  }

  function plotOf(place, name) {
    const log = state.log.includes(name);
    const runs = RUNS.filter((run) => visible(run) && series(run, name)[0].length);
    const lines = [], styles = [];
    for (const run of runs) {
      const [steps, raw] = series(run, name);
      const xs = state.x === "step" ? steps : steps.map((step) => hours(run, step));
      const values = log ? raw.map((value) => (value > 0 ? value : null)) : raw;
      const isSmooth = state.smooth > 0 && values.length > 2;
      if (isSmooth) {
        lines.push([xs, values]);
        styles.push({ run, faint: true, stroke: `${run.color}44`, width: 1, points: { show: false } });
      }
      const points = { show: values.length * runs.length <= 400 && values.length <= 60, size: 5, fill: run.color };
      const drawn = isSmooth ? smoothed(raw, state.smooth).map((value) => (log && value <= 0 ? null : value)) : values;
      lines.push([xs, drawn]);
      styles.push({ run, stroke: run.color, width: 1.6, points });
    }
    const data = joined(lines);
    const readout = place.parentNode.querySelector(".readout");
    /** The values at `index`; of many runs those nearest to the cursor's `height`, or without a cursor the highest. */
    const told = (index, height = Infinity) => {
      let found = styles.flatMap((style, number) => {
        if (style.faint) return [];
        const values = data[number + 1];
        let at = index === null ? values.length - 1 : index;
        while (at > 0 && (values[at] === null || values[at] === undefined)) at -= 1;
        return values[at] === null || values[at] === undefined ? [] : [{ run: style.run, value: values[at], x: data[0][at] }];
      });
      const all = found.length, latest = Math.max(...found.map(({ x }) => x)), place = (x) => (state.x === "step" ? `step ${x}` : `${short(x)} h`);
      if (all > MOST_TOLD) {
        const far = ({ value }) => (height === Infinity ? -value : Math.abs(value - height));
        found = found.sort((a, b) => far(a) - far(b)).slice(0, MOST_TOLD);
      }
      readout.replaceChildren(...found.map(({ run, value, x }) => {
        const where = all > MOST_TOLD ? null : element("small", {}, place(x));
        const text = element("span", { title: run.name }, `${RUNS.length > 1 ? `${run.name} ` : ""}${short(value)} `, where);
        text.style.color = run.color;
        return text;
      }), all > MOST_TOLD ? element("small", { textContent: `${MOST_TOLD} of ${all}, ${place(latest)}` }) : "");
    };
    told(null);
    const plot = new uPlot({
      width: Math.max(Math.floor(place.clientWidth), 200), height: 200, legend: { show: false },
      scales: { x: { time: false, range: (_, low, high) => state.range || padded(low, high) }, y: { distr: log ? 3 : 1 } },
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false, setScale: false }, points: { size: 7 } },
      series: [{}, ...styles.map((style) => ({ ...style, spanGaps: true, run: undefined, faint: undefined }))],
      axes: axes(state.x === "step" ? "" : "hours"),
      hooks: {
        setCursor: [(u) => told(u.cursor.idx === undefined ? null : u.cursor.idx, u.cursor.top >= 0 ? u.posToVal(u.cursor.top, "y") : Infinity)],
        setSelect: [(u) => {
          // a drag in one chart reaches the others through their shared cursor: the first of them tells all
          if (!(u.select.width >= 4)) return;  // NaN in a chart that is not drawn yet
          const ends = [u.select.left, u.select.left + u.select.width].map((at) => u.posToVal(at, "x"));
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          zoom(ends);
        }],
      },
    }, data, place);
    plot.over.addEventListener("dblclick", () => zoom(null));
    return plot;
  }
  function padded(low, high) {
    if (low === null) return [0, 1];
    return low === high ? [low - 1, high + 1] : [low, high];
  }
  function zoom(range) {
    state.range = range && range[1] > range[0] ? range : null;
    const [from, to] = [document.getElementById("from"), document.getElementById("to")];
    [from.value, to.value] = state.range ? state.range.map((end) => short(end)) : ["", ""];
    for (const { plot } of charts.values()) plot.setData(plot.data);  // asks for the range again
  }

  function card(name) {
    const place = element("div", { className: "plot" });
    const title = DATA.titles[name];
    const log = checkbox(state.log.includes(name), (on) => {
      state.log = on ? [...state.log, name] : state.log.filter((each) => each !== name);
      redraw(name);
      remember();
    }, "log");
    const close = element("button", { title: "Hide this chart", textContent: "×", onclick: () => choose(name, false) });
    const head = element("header", {}, element("b", {}, name), labelled("log", log), close);
    const box = element("div", { className: "card" }, head,
      element("p", { className: "note", textContent: title || "\u00a0" }), place, element("p", { className: "readout" }));
    return { box, place, plot: null };
  }
  function redraw(name) {
    const chart = charts.get(name);
    if (chart.plot) chart.plot.destroy();
    chart.plot = plotOf(chart.place, name);
  }
  function redrawAll() { for (const name of charts.keys()) redraw(name); remember(); }

  function showCharts() {
    const grid = document.getElementById("grid");
    for (const [name, chart] of charts) {
      if (!state.shown.includes(name)) {
        resize.unobserve(chart.place);
        chart.plot.destroy();
        chart.box.remove();
        charts.delete(name);
      }
    }
    for (const name of state.shown) {
      if (!charts.has(name)) {
        const chart = card(name);
        charts.set(name, chart);
        grid.append(chart.box);
        redraw(name);
        resize.observe(chart.place);
      }
    }
    document.getElementById("chosen").textContent = `Charts: ${state.shown.length} of ${METRICS.length}`;
    for (const box of document.querySelectorAll("#chooser input[type=checkbox]")) box.checked = state.shown.includes(box.name);
  }
  function choose(name, on) {
    state.shown = on ? [...state.shown, name] : state.shown.filter((each) => each !== name);
    showCharts();
    remember();
  }

  function chooser() {
    const groups = new Map();
    for (const name of METRICS) {
      const group = name.includes("/") ? name.split("/")[0] : "others";
      groups.set(group, [...(groups.get(group) || []), name]);
    }
    const lists = [...groups].map(([group, names]) => element("fieldset", {}, element("legend", { textContent: group }),
      ...names.map((name) => element("label", {}, checkbox(state.shown.includes(name), (on) => choose(name, on), name), " ", name))));
    const search = element("input", { type: "search", placeholder: "find a number", oninput: () => {
      for (const label of document.querySelectorAll("#chooser label")) label.hidden = !label.textContent.includes(search.value);
    } });
    const set = (names) => () => { state.shown = names; showCharts(); remember(); };
    return element("details", { id: "chooser" }, element("summary", { id: "chosen" }), element("p", { className: "bar" }, search,
      element("button", { textContent: "all", onclick: set([...METRICS]) }),
      element("button", { textContent: "none", onclick: set([]) }),
      element("button", { textContent: "the usual ones", onclick: set([...DATA.shown]) })), element("div", { className: "names" }, ...lists));
  }

  function legend() {
    if (RUNS.length === 1) return null;
    const hide = (names) => {
      state.hidden = names;
      for (const box of document.querySelectorAll("#legend input")) box.checked = !names.includes(box.name);
      redrawAll();
      if (drawKl) drawKl();
    };
    const names = RUNS.map((run) => run.name), without = (name) => state.hidden.filter((each) => each !== name);
    return element("p", { className: "bar", id: "legend" }, ...RUNS.map((run) => {
      const label = element("label", {}, checkbox(visible(run), (on) => hide(on ? without(run.name) : [...state.hidden, run.name]), run.name), ` ${run.name}`);
      label.style.color = run.color;
      return label;
    }), element("button", { textContent: "all runs", onclick: () => hide([]) }), element("button", { textContent: "none", onclick: () => hide(names) }));
  }

  /** The table of runs: names in their colours, and a click on a column's name sorts by it, the highest first. */
  function buildRuns() {
    const rows = [...document.querySelectorAll("#runs tbody tr")], body = document.querySelector("#runs tbody");
    if (RUNS.length === 1) return;
    rows.forEach((row, number) => { row.cells[0].style.color = RUNS[number].color; });
    const text = (row, column) => row.cells[column].textContent;
    const compared = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
    document.querySelectorAll("#runs th").forEach((head, column, heads) => {
      head.classList.add("sorts");
      head.onclick = () => {
        const down = head.dataset.order !== "down";
        for (const each of heads) delete each.dataset.order;
        head.dataset.order = down ? "down" : "up";
        const [told, empty] = [rows.filter((row) => text(row, column)), rows.filter((row) => !text(row, column))];
        told.sort((a, b) => compared(text(a, column), text(b, column)) * (down ? -1 : 1));
        body.replaceChildren(...told, ...empty);
      };
    });
  }

  function buildCharts() {
    const section = document.getElementById("charts");
    if (!METRICS.length) return;
    const smooth = element("input", { type: "range", id: "smooth", min: 0, max: 0.98, step: 0.02, value: state.smooth,
      oninput: () => { state.smooth = +smooth.value; redrawAll(); } });
    const ends = ["from", "to"].map((id) => element("input", { type: "number", id, onchange: () => {
      const [from, to] = ["from", "to"].map((end) => document.getElementById(end).value);
      const xs = [...charts.values()].flatMap(({ plot }) => [plot.data[0][0], plot.data[0][plot.data[0].length - 1]]);
      zoom(from === "" && to === "" ? null : [from === "" ? Math.min(...xs) : +from, to === "" ? Math.max(...xs) : +to]);
    } }));
    const timed = RUNS.some((run) => run.clock.length);
    const x = timed ? labelled("over", select([["step", "steps"], ["hours", "hours"]], state.x, (value) => {
      state.x = value;
      zoom(null);
      redrawAll();
    }, "x")) : null;
    if (!timed) state.x = "step";
    section.append(element("h2", { textContent: "Charts" }), chooser(), ...[legend()].filter(Boolean), element("p", { className: "bar" },
      labelled("smooth", smooth), x, labelled("from", ends[0]), labelled("to", ends[1]),
      element("button", { textContent: "whole run", id: "whole", onclick: () => zoom(null) })),
      element("p", { className: "note", textContent: "Drag over a chart to zoom all of them; a double click shows the whole run." }),
      element("div", { id: "grid", className: "grid" }));
    showCharts();
  }

  // KL against reward

  let drawKl = null;

  /** Points [kl, reward, step]: each reward with the KL of the policy that earned it. */
  function earned(run, kl, reward) {
    const [klSteps, kls] = series(run, kl), [steps, rewards] = series(run, reward);
    if (!klSteps.length) return [];
    return steps.map((step, place) => {
      // a collection logs both with the first step after it; an evaluation after step s saw the policy of the next collection
      const at = nearest(klSteps, reward.startsWith("rollout") ? step : step + 1);
      return [step === 0 ? 0 : kls[at], rewards[place], step];
    });
  }

  function buildKl() {
    const kl = ["policy/kl", "kl", "losses/kl"].find((name) => METRICS.includes(name));
    const rewards = METRICS.filter((name) => name === "rollout_scores/mean" || /^(reward|metrics)\//.test(name));
    if (!kl || !rewards.length) return;
    const section = document.getElementById("kl");
    const place = element("div", { className: "plot" }), readout = element("p", { className: "readout" });
    let reward = rewards.find((name) => name === "rollout_scores/mean") || rewards.find((name) => name.startsWith("reward/mean")) || rewards[0];
    const choice = select(rewards.map((name) => [name, name]), reward, (value) => { reward = value; drawKl(); }, "reward");
    const chart = { place, plot: null };
    drawKl = () => {
      if (chart.plot) chart.plot.destroy();
      const runs = RUNS.filter((run) => visible(run)).map((run) => [run, earned(run, kl, reward)]).filter(([, points]) => points.length);
      const sorted = runs.map(([run, points]) => [run, points.slice().sort((a, b) => a[0] - b[0]), points]);
      // two points with one KL would be one: uPlot joins lines by their x
      for (const [, points] of sorted) points.forEach((point, at) => {
        if (at && point[0] <= points[at - 1][0]) points[at] = [points[at - 1][0] + 1e-9 * Math.max(1, Math.abs(points[at - 1][0])), point[1], point[2]];
      });
      const data = joined(sorted.map(([, points]) => [points.map((point) => point[0]), points.map((point) => point[1])]));
      chart.plot = new uPlot({
        width: Math.max(Math.floor(place.clientWidth), 200), height: 300, legend: { show: false },
        scales: { x: { time: false } },
        cursor: { drag: { x: true, y: true, uni: 20 }, points: { size: 9 } },
        series: [{}, ...sorted.map(([run]) => ({ stroke: run.color, paths: () => null, points: { show: true, size: 6, fill: run.color } }))],
        axes: axes(kl),
        hooks: {
          // the way of the policy, in the order of its steps
          drawAxes: [(u) => {
            for (const [run, , points] of sorted) {
              u.ctx.save();
              u.ctx.beginPath();
              u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
              u.ctx.clip();
              u.ctx.beginPath();
              points.forEach((point) => u.ctx.lineTo(u.valToPos(point[0], "x", true), u.valToPos(point[1], "y", true)));
              u.ctx.strokeStyle = `${run.color}55`;
              u.ctx.stroke();
              u.ctx.restore();
            }
          }],
          setCursor: [(u) => {
            const at = u.cursor.idx;
            readout.replaceChildren(...(at === null || at === undefined ? [] : sorted.flatMap(([run, points], number) => {
              if (typeof data[number + 1][at] !== "number") return [];
              const point = points.find((each) => each[0] === data[0][at]);
              const text = element("span", {}, `${RUNS.length > 1 ? `${run.name}: ` : ""}KL ${short(point[0])}, ${reward} ${short(point[1])} `,
                element("small", { textContent: `step ${point[2]}` }));
              text.style.color = run.color;
              return [text];
            })));
          }],
        },
      }, data, place);
    };
    section.append(element("h2", { textContent: "KL against reward" }), element("p", { className: "bar" }, labelled("reward", choice)),
      element("p", { className: "note", textContent: "A point is a policy. The further right, the further it is from the first one." }),
      element("div", { className: "card" }, place, readout));
    charts.set("\u0000kl", chart);
    drawKl();
    charts.delete("\u0000kl");
    fit(chart);
  }
  /** Keeps a chart as wide as its place. */
  function fit(chart) {
    new ResizeObserver(() => {
      if (chart.plot) chart.plot.setSize({ width: Math.max(Math.floor(chart.place.clientWidth), 200), height: chart.plot.height });
    }).observe(chart.place);
  }

  // histograms

  function buildHistograms() {
    const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.histograms)))];
    if (!names.length) return;
    const runs = RUNS.filter((run) => Object.keys(run.histograms).length), grid = element("div", { className: "grid" });
    const show = (run) => grid.replaceChildren(...names.filter((name) => run.histograms[name]).map((name) => histogram(run, name)));
    const choice = select(runs.map((run) => [run.name, run.name]), runs[0].name, (value) => show(runs.find((run) => run.name === value)), "whose");
    document.getElementById("histograms").append(element("h2", { textContent: "Histograms over time" }),
      element("p", { className: "note", textContent: "A column is a collection: the darker, the more numbers are there." }),
      ...(runs.length > 1 ? [element("p", { className: "bar" }, labelled("run", choice))] : []), grid);
    show(runs[0]);
  }
  /** A column for each collection, from its lowest to its highest number. */
  function histogram(run, name) {
    const place = element("div", { className: "plot" }), readout = element("p", { className: "readout" });
    const box = element("div", { className: "card" }, element("header", {}, element("b", { textContent: name })), place, readout);
    const columns = run.histograms[name], steps = columns.map(([step]) => step), last = steps.length - 1;
    const ends = steps.map((step, at) => (at < last ? steps[at + 1] : step + (last ? step - steps[at - 1] : 1)));
    const draw = (u) => {
      u.ctx.save();
      u.ctx.beginPath();
      u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
      u.ctx.clip();
      u.ctx.fillStyle = run.color;
      columns.forEach(([step, low, high, counts], at) => {
        const left = u.valToPos(step, "x", true), right = u.valToPos(ends[at], "x", true), most = Math.max(...counts);
        const [bottom, top] = [low, high].map((value) => u.valToPos(value, "y", true)), size = (bottom - top) / counts.length;
        counts.forEach((count, bin) => {
          u.ctx.globalAlpha = Math.sqrt(count / most) || 0;
          u.ctx.fillRect(left, bottom - (bin + 1) * size - (low === high ? 2 : 0), right - left, Math.max(size, low === high ? 4 : 1));
        });
      });
      u.ctx.restore();
    };
    const told = (u) => {
      const at = u.cursor.left >= 0 ? Math.max(steps.findLastIndex((step) => step <= u.posToVal(u.cursor.left, "x")), 0) : last;
      const [step, low, high, counts] = columns[at], size = (high - low) / counts.length, all = counts.reduce((sum, count) => sum + count, 0);
      const bin = Math.floor((u.posToVal(u.cursor.top, "y") - low) / size), inside = u.cursor.left >= 0 && bin >= 0 && bin < counts.length;
      const there = inside ? `, ${counts[bin]} from ${short(low + bin * size)} to ${short(low + (bin + 1) * size)}` : "";
      readout.replaceChildren(`${all} from ${short(low)} to ${short(high)}${there} `, element("small", { textContent: `step ${step}` }));
    };
    const made = () => new uPlot({
      width: Math.max(Math.floor(place.clientWidth), 200), height: 220, legend: { show: false },
      scales: { x: { time: false, range: (_, low, high) => (last ? [low, high === steps[last] ? ends[last] : high] : [steps[0], ends[0]]) } },
      cursor: { drag: { x: true, y: false }, points: { show: false } },
      series: [{}, ...[0, 1].map(() => ({ paths: () => null, points: { show: false } }))],
      axes: axes(""),
      hooks: { drawAxes: [draw], setCursor: [told], ready: [told] },
    }, [steps, columns.map(([, low]) => low), columns.map(([, , high]) => high)], place);
    const chart = { place, plot: null };
    requestAnimationFrame(() => { chart.plot = made(); fit(chart); });  // the card has no width before it is in the page
    return box;
  }

  // samples

  function buildSamples() {
    const sets = RUNS.flatMap((run) => run.samples.map((each) => ({ ...each, run })));
    if (!sets.length) return;
    const kinds = [["eval", "evaluations"], ["rollout", "rollouts"]].filter(([kind]) => sets.some((each) => each.kind === kind));
    const chosen = { kind: kinds[0][0], step: "last", run: "", search: "", sort: null, down: true };
    const section = document.getElementById("samples"), body = element("div", { id: "rows" }), count = element("small", { id: "count" });
    const bar = element("p", { className: "bar" });
    const steps = () => [...new Set(sets.filter((each) => each.kind === chosen.kind).map((each) => each.step))].sort((a, b) => a - b);
    const search = element("input", { type: "search", id: "search", placeholder: "find in samples",
      oninput: () => { chosen.search = search.value; show(); } });
    const step = element("select", { id: "step", onchange: () => { chosen.step = step.value; show(); } });
    const fill = () => {
      const options = [["last", "last step"], ["all", "all steps"], ...steps().map((each) => [String(each), `step ${each}`])];
      step.replaceChildren(...options.map(([value, textContent]) => element("option", { value, textContent })));
      if (![...step.options].some((option) => option.value === chosen.step)) chosen.step = "last";
      step.value = chosen.step;
    };
    const go = (by) => () => {
      const all = steps(), now = chosen.step === "last" ? all.length - 1 : all.indexOf(+chosen.step);
      chosen.step = String(all[Math.min(Math.max((now < 0 ? all.length : now) + by, 0), all.length - 1)]);
      fill();
      show();
    };
    bar.append(labelled("from", select(kinds, chosen.kind, (value) => { chosen.kind = value; fill(); show(); }, "kind")),
      ...(RUNS.length > 1 ? [labelled("run", select([["", "all"], ...RUNS.map((run) => [run.name, run.name])], "",
        (value) => { chosen.run = value; show(); }, "run"))] : []),
      element("button", { textContent: "‹", title: "earlier", onclick: go(-1) }), step,
      element("button", { textContent: "›", title: "later", onclick: go(1) }), search);
    const matching = () => {
      const all = steps(), wanted = chosen.step === "last" ? all[all.length - 1] : +chosen.step, needle = chosen.search.toLowerCase();
      const found = [];
      for (const each of sets) {
        if (each.kind !== chosen.kind || (chosen.run && each.run.name !== chosen.run)) continue;
        // runs may end at different steps: the last one of each
        const last = chosen.step === "last" && each.step === Math.max(...each.run.samples.filter((s) => s.kind === chosen.kind).map((s) => s.step));
        if (chosen.step !== "all" && !last && !(chosen.step !== "last" && each.step === wanted)) continue;
        for (const row of each.rows) {
          const entry = Object.fromEntries(each.columns.map((column, at) => [column, row[at]]));
          if (!needle || row.some((value) => String(value).toLowerCase().includes(needle))) found.push({ each, entry });
        }
      }
      return found;
    };
    const show = () => {
      const found = matching(), columns = [...new Set(found.flatMap(({ each }) => each.columns))];
      if (chosen.sort) {
        const value = (row) => row.entry[chosen.sort] ?? "";
        found.sort((a, b) => (value(a) > value(b) ? 1 : value(a) < value(b) ? -1 : 0) * (chosen.down ? -1 : 1));
      }
      const before = [...(RUNS.length > 1 ? ["run"] : []), "step"];
      const head = element("tr", {}, ...before.map((name) => element("th", { textContent: name })), ...columns.map((name) => {
        const mark = chosen.sort === name ? (chosen.down ? " ▾" : " ▴") : "";
        const cell = element("th", { textContent: name + mark, title: "Sort", onclick: () => {
          chosen.down = chosen.sort === name ? !chosen.down : true;
          chosen.sort = name;
          show();
        } });
        cell.classList.add("sorts");
        return cell;
      }));
      const rows = found.slice(0, MOST_ROWS).map(({ each, entry }) => {
        const row = element("tr", {});
        if (RUNS.length > 1) {
          const name = element("td", { textContent: each.run.name });
          name.style.color = each.run.color;
          row.append(name);
        }
        row.append(element("td", { className: "number", textContent: each.step }));
        for (const column of columns) {
          const value = entry[column], cell = element("td", { textContent: short(value) });
          if (typeof value === "number") cell.className = "number";
          if (column === "prompt") {
            cell.classList.add("sorts");
            cell.title = "Show this prompt at all steps";
            cell.onclick = () => { chosen.search = search.value = String(value); chosen.step = "all"; fill(); show(); };
          }
          row.append(cell);
        }
        return row;
      });
      const shown = found.length > rows.length ? `the first ${rows.length} of ${found.length}` : String(found.length);
      count.textContent = `${shown} ${found.length === 1 ? "sample" : "samples"}`;
      body.replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
    };
    body.className = "wide";
    section.append(element("h2", {}, "Samples", count), bar, body);
    fill();
    show();
  }

  buildRuns();
  buildCharts();
  buildKl();
  buildHistograms();
  buildSamples();
  if (!state.shown.length && METRICS.length) document.getElementById("chooser").open = true;
})();
