"use strict";
// Shows reports of engine_bench and engine_run (perf/report.schema.json), and beside them what the
// peers' scripts wrote (perf/cpu_peers.py, gpu_peers.py, cpu_system.py, client_token_bench). They
// come from the page itself (engine_bench --html), from files, or from ?report=URL.

const PHASES = ["embed", "cloak", "encode", "encrypt", "network", "body", "decrypt", "decode", "uncloak", "de_embed", "sample"];
const PHASE_COLORS = ["#8ecae6", "#219ebc", "#b5c99a", "#718355", "#f4a261", "#8d99ae", "#a3b18a", "#588157", "#e9c46a", "#e76f51", "#9d4edd"];
const SERIES_COLORS = ["#3b82c4", "#e07a3f", "#4d9f6b", "#b0578d", "#c9a227", "#6c6fc2", "#4aa3a2", "#a05d56"];
const MIB = 1024 * 1024;

const reports = [];  // { name, data }, oldest first
const peers = [];    // { where, what, who, ms }
const charts = {};
const el = (id) => document.getElementById(id);

// ---- reports ----

// What the charts read must be there; the rest of the schema is the tests' business.
function problemOf(data) {
  if (data === null || typeof data !== "object" || Array.isArray(data)) return "it is not a report";
  if (data.schema !== "infemeral-report") return "it is not a report of engine_bench or engine_run";
  if (data.schema_version !== 1) return `it is of version ${String(data.schema_version).slice(0, 20)}, and this page reads version 1`;
  if (Number.isNaN(Date.parse(data.created))) return "it has no valid date";
  for (const part of ["build", "environment", "model", "options"]) {
    if (typeof data[part] !== "object" || data[part] === null) return `it has no "${part}"`;
  }
  for (const run of runsOf(data)) {
    for (const part of ["phases", "wire", "memory", "tokens"]) {
      if (run === null || typeof run[part] !== "object" || run[part] === null) return `a run has no "${part}"`;
    }
    for (const token of ["first_token", "decode"]) {
      for (const phase of PHASES) {
        if (!Number.isFinite(run.phases[token]?.[phase]?.mean_ms)) return `a run has no time for the phase ${phase}`;
      }
    }
  }
  for (const p of sweepOf(data)) {
    const needed = ["rtt_ms", "bits_per_second", "p50_ttft_ms", "p50_tpot_ms", "limit_ttft_ms", "limit_tpot_ms"];
    if (p === null || needed.some((field) => !Number.isFinite(p[field]))) return "a point of its sweep is not complete";
  }
  for (const c of casesOf(data)) {
    if (c === null || !Number.isFinite(c.p50_ms) || typeof c.name !== "string") return "a case has no p50";
  }
  return null;
}

const runsOf = (data) => data.tool === "engine_bench" ? (data.runs ?? []) : [{ backend: data.options.backend, ...data }];
const casesOf = (data) => data.cases ?? [];
const sweepOf = (data) => data.sweep ?? [];

// A file among others need not be for this page: false for one that is not.
function addText(name, text, amongOthers = false) {
  let data;
  try {
    data = JSON.parse(text);
  } catch (error) {
    try {  // a line for each record
      data = text.trim().split("\n").map((line) => JSON.parse(line));
    } catch {
      if (amongOthers) return false;
      say(`${name} cannot be read: it is not JSON (${error.message})`);
      return true;
    }
  }
  return addData(name, data, amongOthers);
}

const threads = (n) => n === 1 ? "1 thread" : `${n} threads`;

// What a peers' script measured, as milliseconds for a token; null where it is another file.
function peersOf(data) {
  const found = [];
  const add = (where, what, who, ms) => {
    if (!Number.isFinite(ms) || ms <= 0) throw new Error("no time");
    found.push({ where, what, who, ms });
  };
  if (Array.isArray(data) && data.length > 0 && data.every((line) => line?.token_ms_p50 !== undefined)) {
    for (const line of data) {
      const sampling = line.sampling.startsWith("top-p") ? "top-p" : line.sampling;
      add(line.backend.replace(/^cuda \((.*)\)$/, "$1"), `client, ${line.shape}, ${sampling}`, "infemeral", line.token_ms_p50);
    }
  } else if (data?.schema === "infemeral-gpu-peers") {
    for (const shape of data.shapes) {
      const what = `client, ${shape.vocab_size}x${shape.hidden_size}`;
      const eager = shape.eager_original, where = data.environment.gpu;
      if (eager?.sampled) add(where, `${what}, top-p`, "PyTorch, original", eager.sampled.wall_ms);
      if (eager?.greedy) add(where, `${what}, greedy`, "PyTorch, original", eager.greedy.wall_ms);
      const compiled = shape.compiled_graph_greedy;
      if (compiled?.wall_ms) add(where, `${what}, greedy`, "PyTorch, compiled, head alone", compiled.wall_ms);
    }
  } else if (data?.torch_token_ms && data?.ours) {
    const where = `${threads(data.threads)} of ${data.cpu}`;
    for (const [field, sampling, ours] of [["greedy", "greedy", "certified greedy"], ["top_p", "top-p", "certified top-p"]]) {
      const what = `client, ${data.shape}, ${sampling}`;
      add(where, what, "infemeral", data.ours.ms[ours].median);
      const best = Object.entries(data.torch_token_ms.median).sort(([, a], [, b]) => a[field] - b[field])[0];
      add(where, what, `PyTorch, ${best[0]}`, best[1][field]);
    }
  } else if (data?.llama_cpp_python && Array.isArray(data.runs)) {
    for (const run of data.runs) {
      const where = `${threads(run.threads)} of ${data.machine.cpu}`;
      for (const [field, what] of [["decode", "whole system, a decoded token"], ["prompt", "whole system, a token of the prompt"]]) {
        add(where, what, "infemeral", 1000 / run[field].median);
        add(where, what, "llama.cpp, not private", 1000 / run[`${field}_llama`].median);
      }
    }
  } else {
    return null;
  }
  return found;
}

function addData(name, data, amongOthers = false) {
  let problem;
  try {
    const others = peersOf(data);
    if (others !== null) {
      peers.push(...others);
      draw();
      return true;
    }
    if (amongOthers && data?.schema !== "infemeral-report") return false;
    problem = problemOf(data);
  } catch {
    problem = "it is damaged";
  }
  if (problem !== null) {
    say(`${name} cannot be shown: ${problem}`);
    return true;
  }
  reports.push({ name, data });
  reports.sort((a, b) => Date.parse(a.data.created) - Date.parse(b.data.created));
  draw();
  return true;
}

function say(message, kind = "problem") {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = message;
  el("messages").append(line);
}

// ---- what the charts show ----

const revision = (data) => data.build.git_revision;

// Revision and day; also the file's name where two reports have both in common, and its folders where
// they have that in common too.
function reportLabel(data, separator) {
  const label = (d) => `${revision(d).slice(0, 12)}${separator}${d.created.slice(0, 10)}`;
  const base = (r) => r.name.replace(/\.json$/, "").split("/").pop();
  const same = reports.filter((r) => label(r.data) === label(data));
  if (same.length === 1) return label(data);
  const own = same.find((r) => r.data === data);
  return `${label(data)}${separator}${same.some((r) => r !== own && base(r) === base(own)) ? own.name : base(own)}`;
}

// "cpu", or "cpu · 1a2b3c" where there is more than one report.
function runLabel(data, run) {
  return reports.length > 1 ? `${run.backend} · ${reportLabel(data, " · ")}` : run.backend;
}

// Every run that made a token, with a label of its own.
function shownRuns() {
  const list = [];
  for (const { data } of reports) {
    for (const run of runsOf(data)) {
      if (run.tokens.output > 0) list.push({ data, run, label: runLabel(data, run) });
    }
  }
  return list;
}

// Milliseconds that the memory needs for what a decode token reads once: the body's weights, where
// the body is here, and the head's rows and the cloak, where the client is on the CPU; null where a
// report does not say how fast the memory is.
function memoryLimit({ data, run }) {
  const speed = data.environment.read_bytes_per_second;
  if (!(speed > 0)) return null;
  const m = run.memory;
  const head = m.head_copy_bytes || m.lm_head_bytes || m.embed_tokens_bytes;
  const bytes = (m.body_weights_bytes ?? 0) + (run.backend.startsWith("cpu") ? head + (m.cloak_bytes ?? 0) : 0);
  return bytes > 0 ? 1000 * bytes / speed : null;
}

function phaseData(token) {
  const runs = shownRuns();
  return {
    labels: runs.map((r) => r.label),
    limits: token === "decode" ? runs.map(memoryLimit) : [],
    datasets: PHASES.map((phase, i) => ({
      label: phase,
      backgroundColor: PHASE_COLORS[i],
      data: runs.map((r) => r.run.phases[token][phase].mean_ms),
    })),
  };
}

// A histogram where the report has its samples, and percentiles where not.
function distribution(runs, latency, samplesOf) {
  if (runs.length > 0 && runs.every((r) => samplesOf(r.run).length > 0)) {
    const all = runs.map((r) => samplesOf(r.run));
    const sorted = all.flat().sort((a, b) => a - b);
    // One outlier must not squeeze the rest into a single bar: the last bar holds what is beyond p99.
    const low = sorted[0], high = sorted[Math.min(sorted.length - 1, Math.floor(0.99 * sorted.length))];
    const bins = Math.max(1, Math.min(30, Math.ceil(Math.sqrt(sorted.length))));
    const width = (high - low) / bins || 1;
    return {
      histogram: true,
      note: `Samples by ms; the last bar holds all above ${high.toPrecision(3)} ms too`,
      labels: Array.from({ length: bins }, (_, i) => (low + (i + 0.5) * width).toPrecision(3)),
      datasets: runs.map((r, s) => {
        const counts = new Array(bins).fill(0);
        for (const ms of all[s]) counts[Math.min(bins - 1, Math.max(0, Math.floor((ms - low) / width)))] += 1;
        return { label: r.label, data: counts, backgroundColor: SERIES_COLORS[s % SERIES_COLORS.length] };
      }),
    };
  }
  const fields = ["p50", "p90", "p95", "p99"];
  return {
    note: "Percentiles in ms (engine_bench --save-detailed keeps the samples)",
    labels: fields,
    datasets: runs.map((r, s) => ({
      label: r.label,
      data: fields.map((f) => r.run[`${f}_${latency}_ms`]),
      backgroundColor: SERIES_COLORS[s % SERIES_COLORS.length],
    })),
  };
}

const ttftSamples = (run) => (run.samples ?? []).map((s) => s.ttft_ms);
const tpotSamples = (run) => (run.samples ?? []).filter((s) => s.output_tokens > 1)
  .map((s) => (s.e2el_ms - s.ttft_ms) / (s.output_tokens - 1));

function caseData() {
  const names = [...new Set(reports.flatMap((r) => casesOf(r.data).map((c) => c.name)))];
  const series = new Map();
  for (const { data } of reports) {
    for (const c of casesOf(data)) {
      const label = runLabel(data, c);
      if (!series.has(label)) series.set(label, { data: new Array(names.length).fill(null), ranges: [] });
      series.get(label).data[names.indexOf(c.name)] = c.p50_ms;
      series.get(label).ranges[names.indexOf(c.name)] = [c.min_ms, c.p90_ms];
    }
  }
  return {
    labels: names,
    datasets: [...series].map(([label, values], s) => ({
      label, ...values, backgroundColor: SERIES_COLORS[s % SERIES_COLORS.length],
    })),
  };
}

// A line for each bandwidth over the round trip times, and dashed what the line alone takes.
function sweepData(latency) {
  const series = new Map();
  const alone = new Set(reports.flatMap((r) => sweepOf(r.data).map((p) => runLabel(r.data, p)))).size === 1;
  for (const { data } of reports) {
    for (const p of sweepOf(data)) {
      const speed = p.bits_per_second > 0 ? `${p.bits_per_second / 1e6} Mbit/s` : "line not limited";
      const label = alone ? speed : `${runLabel(data, p)}, ${speed}`;
      if (!series.has(label)) series.set(label, []);
      series.get(label).push({ x: p.rtt_ms, y: p[`p50_${latency}_ms`], limit: p[`limit_${latency}_ms`] });
    }
  }
  const datasets = [];
  [...series].forEach(([label, points], s) => {
    const line = SERIES_COLORS[s % SERIES_COLORS.length];
    points.sort((a, b) => a.x - b.x);
    datasets.push({ label, data: points.map(({ x, y }) => ({ x, y })), borderColor: line, backgroundColor: line });
    datasets.push({ label: `${label}: limit`, data: points.map(({ x, limit }) => ({ x, y: limit })),
      borderColor: line, backgroundColor: "transparent", borderDash: [6, 4], borderWidth: 1.5, pointRadius: 0 });
  });
  return { labels: [], datasets };
}

// What is the same work on the same machine lies side by side.
function peerData() {
  const groupOf = (p) => `${p.what} (${p.where})`;
  const ours = new Set(peers.filter((p) => p.who === "infemeral").map(groupOf));
  const compared = (group) => ours.has(group) && peers.some((p) => groupOf(p) === group && p.who !== "infemeral");
  const all = [...new Set(peers.map(groupOf))].sort();
  const groups = all.some(compared) ? all.filter(compared) : all;
  const shown = peers.filter((p) => groups.includes(groupOf(p)));
  const names = [...new Set(shown.map((p) => p.who))].sort((a, b) => (b === "infemeral") - (a === "infemeral"));
  return {
    labels: groups,
    datasets: names.map((who, s) => ({
      label: who,
      data: groups.map((group) => shown.find((p) => p.who === who && groupOf(p) === group)?.ms ?? null),
      backgroundColor: SERIES_COLORS[s % SERIES_COLORS.length],
    })),
  };
}

function historyData(name) {
  const holders = reports.filter((r) => casesOf(r.data).some((c) => c.name === name));
  const backends = [...new Set(holders.flatMap((r) => casesOf(r.data).filter((c) => c.name === name).map((c) => c.backend)))];
  return {
    labels: holders.map((r) => reportLabel(r.data, "\n").split("\n")),
    datasets: backends.map((backend, s) => ({
      label: backend,
      data: holders.map((r) => casesOf(r.data).find((c) => c.name === name && c.backend === backend)?.p50_ms ?? null),
      borderColor: SERIES_COLORS[s % SERIES_COLORS.length],
      backgroundColor: SERIES_COLORS[s % SERIES_COLORS.length],
      spanGaps: true,
    })),
  };
}

const WIRE = [["up, as made", "tensor_bytes_up"], ["up, packed", "packed_bytes_up"], ["up, on the wire", "bytes_up"],
  ["down, as made", "tensor_bytes_down"], ["down, packed", "packed_bytes_down"], ["down, on the wire", "bytes_down"]];

function wireData() {
  return {
    labels: WIRE.map(([label]) => label),
    datasets: shownRuns().map((r, s) => ({
      label: r.label,
      data: WIRE.map(([, field]) => r.run.wire[field] / Math.max(1, r.run.wire.steps)),
      backgroundColor: SERIES_COLORS[s % SERIES_COLORS.length],
    })),
  };
}

const MEMORY = [["peak RSS", "peak_rss_bytes"], ["peak device", "device_peak_bytes"], ["embed_tokens", "embed_tokens_bytes"],
  ["lm_head", "lm_head_bytes"], ["head copy", "head_copy_bytes"], ["cloak", "cloak_bytes"], ["body", "body_weights_bytes"],
  ["KV cache", "kv_bytes"]];

function memoryData() {
  return {
    labels: MEMORY.map(([label]) => label),
    datasets: shownRuns().map((r, s) => ({
      label: r.label,
      data: MEMORY.map(([, field]) => (r.run.memory[field] ?? 0) / MIB),
      backgroundColor: SERIES_COLORS[s % SERIES_COLORS.length],
    })),
  };
}

// ---- drawing ----

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A dashed line across every bar of a horizontal chart, where its limit is.
const limitLines = {
  id: "limitLines",
  afterDatasetsDraw(chart) {
    const limits = chart.config.data.limits ?? [];
    const bars = chart.getDatasetMeta(0).data;
    limits.forEach((limit, i) => {
      if (limit === null || !bars[i]) return;
      const x = chart.scales.x.getPixelForValue(limit), half = Math.max(12, bars[i].height / 2 + 6);
      const c = chart.ctx;
      c.save();
      c.strokeStyle = color("--bad");
      c.lineWidth = 2;
      c.setLineDash([5, 3]);
      c.beginPath();
      c.moveTo(x, bars[i].y - half);
      c.lineTo(x, bars[i].y + half);
      c.stroke();
      c.restore();
    });
  },
};

// From the fastest sample to p90, over every bar.
const whiskers = {
  id: "whiskers",
  afterDatasetsDraw(chart) {
    const c = chart.ctx;
    chart.data.datasets.forEach((dataset, d) => {
      if (!chart.isDatasetVisible(d)) return;
      (dataset.ranges ?? []).forEach((range, i) => {
        const bar = chart.getDatasetMeta(d).data[i];
        if (!range || !bar || !range.every((ms) => ms > 0)) return;
        const [from, to] = range.map((ms) => chart.scales.y.getPixelForValue(ms));
        c.save();
        c.strokeStyle = color("--text");
        c.beginPath();
        c.moveTo(bar.x, from);
        c.lineTo(bar.x, to);
        for (const y of [from, to]) {
          c.moveTo(bar.x - 4, y);
          c.lineTo(bar.x + 4, y);
        }
        c.stroke();
        c.restore();
      });
    });
  },
};

const shortened = (value) => Number.isFinite(value) ? Number(value.toPrecision(4)).toLocaleString("en") : "";

// The same values as text, for those who do not see the chart or want the numbers.
function valueTable(figure, data, unit) {
  let details = figure.querySelector("details");
  if (!details) {
    details = document.createElement("details");
    const summary = document.createElement("summary"), scroll = document.createElement("div");
    summary.textContent = "Values";
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.append(document.createElement("table"));
    details.append(summary, scroll);
    figure.append(details);
  }
  const points = data.datasets.some((d) => typeof d.data[0] === "object" && d.data[0] !== null);
  const labels = points ? [...new Set(data.datasets.flatMap((d) => d.data.map((p) => p.x)))].sort((a, b) => a - b) : data.labels;
  const cell = (tag, text, scope) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (scope) made.scope = scope;
    return made;
  };
  const row = (...cells) => {
    const tr = document.createElement("tr");
    tr.append(...cells);
    return tr;
  };
  const value = (d, label, i) => points ? d.data.find((p) => p.x === label)?.y : d.data[i];
  details.querySelector("table").replaceChildren(
    row(cell("th", unit, "col"), ...labels.map((label) => cell("th", points ? `RTT ${label} ms` : label, "col"))),
    ...data.datasets.map((d) => row(cell("th", d.label, "row"), ...labels.map((label, i) => cell("td", shortened(value(d, label, i)))))));
}

function show(id, type, data, options = {}) {
  charts[id]?.destroy();
  delete charts[id];
  const figure = el(id).closest("figure");
  figure.hidden = data.datasets.length === 0;
  if (figure.hidden) return;
  const unit = options.unit ?? "ms";
  const axis = (title) => ({
    stacked: Boolean(options.stacked), grid: { color: color("--line") }, ticks: { color: color("--quiet") },
    title: { display: title !== "", text: title, color: color("--quiet") },
  });
  const scales = options.horizontal ? { x: axis(unit), y: axis("") } : { x: axis(options.across ?? ""), y: axis(unit) };
  const along = options.horizontal ? scales.x : scales.y;
  if (options.log) along.type = "logarithmic";
  if (!options.log) along.beginAtZero = true;
  if (options.across) scales.x.type = "linear";
  if (options.horizontal) scales.y.ticks.autoSkip = false;
  if (options.horizontal) scales.y.ticks.callback = function (i) { return wrapped(this.getLabelForValue(i), this.chart.width); };
  const limits = (data.limits ?? []).filter((limit) => limit !== null);
  if (limits.length > 0) along.suggestedMax = 1.05 * Math.max(...limits);
  charts[id] = new Chart(el(id), {
    type,
    data: { labels: data.labels, datasets: data.datasets, limits: data.limits },
    plugins: [limitLines, whiskers],
    options: {
      animation: false,
      responsive: true,
      maintainAspectRatio: false,
      indexAxis: options.horizontal ? "y" : "x",
      scales,
      datasets: { bar: { skipNull: true, maxBarThickness: 60 } },
      plugins: {
        legend: { position: "bottom", labels: { color: color("--text"), boxWidth: 12, filter: (item, data) => !data.datasets[item.datasetIndex].borderDash } },
        tooltip: { callbacks: { label: (item) => `${item.dataset.label}: ${shortened(item.parsed[options.horizontal ? "x" : "y"])} ${options.tip ?? unit}` } },
      },
    },
  });
  valueTable(figure, data, unit);
}

// A label in lines that leave most of the chart to its bars.
function wrapped(label, width) {
  const most = Math.max(15, Math.floor(width / 22));
  const lines = [""];
  for (const word of String(label).split(" ")) {
    const last = lines[lines.length - 1];
    if (last !== "" && last.length + 1 + word.length > most) lines.push(word);
    else lines[lines.length - 1] = last === "" ? word : `${last} ${word}`;
  }
  return lines;
}

function drawSummary() {
  const { data } = reports[reports.length - 1];
  const facts = [
    ["Reports", String(reports.length)],
    ["Newest", data.created],
    ["Revision", `${data.build.git_revision} (${data.build.build_type})`],
    ["CPU", `${data.environment.cpu}, ${data.environment.logical_cores} cores`],
    ["GPU", (data.environment.gpus ?? []).join(", ") || "none"],
    ["Model", `${data.model.type} ${data.model.hidden_size} × ${data.model.vocab_size}; body ${data.model.body}`],
    ["Head", data.options.head],
    ["Wire", data.options.wire],
  ];
  el("summary").replaceChildren(...facts.map(([name, value]) => {
    const span = document.createElement("span");
    const bold = document.createElement("b");
    bold.textContent = value;
    span.append(`${name} `, bold);
    return span;
  }));
}

function drawTable() {
  const fields = ["p50_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms", "std_ms"];
  const row = (cells, tag) => {
    const tr = document.createElement("tr");
    tr.append(...cells.map((text) => {
      const cell = document.createElement(tag);
      cell.textContent = text;
      if (tag === "th") cell.scope = "col";
      return cell;
    }));
    return tr;
  };
  const rows = [row(["report", "case", "backend", "samples", ...fields.map((f) => f.replace("_", " ")), "spread", "items/s"], "th")];
  for (const { name, data } of reports) {
    for (const c of casesOf(data)) {
      const spread = c.mean_ms > 0 ? `${(100 * c.std_ms / c.mean_ms).toFixed(1)} %` : "";
      rows.push(row([name, c.name, c.backend, String(c.count), ...fields.map((f) => Number(c[f]).toFixed(4)), spread,
        Number(c.items_per_second).toFixed(1)], "td"));
    }
  }
  el("figures").replaceChildren(...rows);
}

function drawHistory() {
  show("history", "line", historyData(el("history-case").value));
}

function limitNote(runs) {
  const known = runs.map((r) => [r.label, memoryLimit(r)]).filter(([, ms]) => ms !== null);
  if (known.length === 0) return "";
  return `; dashed, the memory's limit, reading the weights once: ${known.map(([label, ms]) =>
    known.length > 1 ? `${label} ${ms.toPrecision(3)}` : ms.toPrecision(3)).join(", ")} ms`;
}

function draw() {
  if (reports.length === 0 && peers.length === 0) return;
  el("empty").hidden = true;
  el("content").hidden = false;
  const compared = peerData();
  // Narrow labels are high ones.
  const rowHeight = window.innerWidth < 600 ? 110 : 56;
  el("peers").parentElement.style.height = `${Math.max(340, 80 + rowHeight * compared.labels.length)}px`;
  show("peers", "bar", compared, { horizontal: true, log: true });
  const runs = shownRuns();
  show("decode-phases", "bar", phaseData("decode"), { stacked: true, horizontal: true });
  el("decode-limit").textContent = limitNote(runs);
  show("first-phases", "bar", phaseData("first_token"), { stacked: true, horizontal: true });
  for (const [id, latency, samplesOf] of [["ttft", "ttft", ttftSamples], ["tpot", "tpot", tpotSamples]]) {
    const data = distribution(runs, latency, samplesOf);
    el(`${id}-note`).textContent = data.note;
    show(id, "bar", data, data.histogram ? { unit: "samples" } : {});
  }
  for (const latency of ["ttft", "tpot"]) {
    show(`sweep-${latency}`, "line", sweepData(latency), { across: "round trip, ms" });
  }
  show("cases", "bar", caseData(), { log: true });
  const select = el("history-case"), chosen = select.value;
  const names = [...new Set(reports.flatMap((r) => casesOf(r.data).map((c) => c.name)))];
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.value = names.includes(chosen) ? chosen : names.includes("decode") ? "decode" : (names[0] ?? "");
  drawHistory();
  show("wire", "bar", wireData(), { unit: "bytes" });
  show("memory", "bar", memoryData(), { unit: "MiB" });
  for (const id of ["summary", "figures-section"]) el(id).hidden = reports.length === 0;
  if (reports.length > 0) {
    drawSummary();
    drawTable();
  }
}

// ---- where reports come from ----

async function addFiles(files) {
  for (const file of files) addText(file.name, await file.text());
}

async function addFolder(files) {
  let others = 0;
  for (const file of files) {
    if (!/\.jsonl?$/.test(file.name)) continue;
    const path = (file.webkitRelativePath || file.name).split("/").slice(1).join("/") || file.name;
    if (!addText(path, await file.text(), true)) others += 1;
  }
  if (reports.length === 0 && peers.length === 0) say("There is no report in this folder");
  else if (others > 0) say(`${others} other JSON file${others === 1 ? "" : "s"} in this folder ${others === 1 ? "is" : "are"} not for this page`, "note");
}

el("files").addEventListener("change", (event) => addFiles(event.target.files));
el("folder").addEventListener("change", (event) => addFolder(event.target.files));
el("history-case").addEventListener("change", drawHistory);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  addFiles(event.dataTransfer.files);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

async function fetchReport(url) {
  try {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    addText(url, await answer.text());
  } catch (error) {
    say(`${url} cannot be loaded: ${error.message}. A page opened from a file may not fetch; open the report with the button.`);
  }
}

for (const { name, data } of JSON.parse(el("reports").textContent)) addData(name, data);
for (const url of new URLSearchParams(location.search).getAll("report")) fetchReport(url);
