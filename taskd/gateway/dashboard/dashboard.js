/*
 * The dashboard: draws what the gateway tells each second over a WebSocket.
 *
 * Three rooms. The first knows numbers and words and no document, so that it can
 * be tried by itself; the second makes and changes elements; the third holds what
 * was heard, and the connection. What a task has made (names, messages, types) is
 * hostile: it reaches the document only through `visible`, and as text.
 */
(function () {
  "use strict";

  const WINDOW_SECONDS = 300; // What the plots show, and all that the server keeps.
  const GAP_INTERVALS = 3; // The daemon was away for longer: no line is drawn across.
  const RATE_SPAN = 5; // Messages between which calls per second are counted; one is too nervous.
  const CROWD = 64; // More workers than these get small tiles,
  const MANY = 16; // and on a phone more than these.
  const BAD_SHARE = 0.01; // Of a function's calls: it is marked.
  const ALARMING_SHARE = 0.05; // Of all that ended just now: the key figure is marked.
  const LONGEST_TEXT = 4000; // Of a hostile text nobody reads more.
  const BRIEF_TEXT = 160;
  const SUMMARY_SECONDS = 30; // Between two spoken summaries.
  const SILENT_INTERVALS = 5; // Without news the figures are old,
  const DEAD_INTERVALS = 15; // and the connection is given up.
  const RETRY_CAP = 30; // Seconds
  const SETTLED_SECONDS = 5; // A connection that lasted for so long has been a good one.
  const SIGN_IN_AGAIN = 4401;
  const STATES = ["busy", "idle", "starting", "draining"];
  const NONE = "–";

  // ---------------------------------------------------------------- numbers and words

  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
  const listOf = (value) => (Array.isArray(value) ? value : []);
  const sumOf = (values) => values.filter(isNumber).reduce((a, b) => a + b, 0);

  /** Write a text so that every character that steers or hides is seen, and does nothing. */
  function visible(text, longest = LONGEST_TEXT) {
    const all = String(text);
    // Not cut between the halves of a pair.
    const kept = all.length > longest ? all.slice(0, longest).replace(/[\uD800-\uDBFF]$/, "") : all;
    const shown = kept.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\u2028\u2029\u115F\u1160\u3164\uFFA0\u034F]/gu, (sign) => {
      const named = { "\0": "NUL", "\t": "TAB", "\n": "LF", "\r": "CR" }[sign];
      return `\u27E8${named || `U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`}\u27E9`;
    });
    return kept === all ? shown : `${shown}…`;
  }

  function count(value) {
    if (!isNumber(value)) return NONE;
    return Math.abs(value) < 1e7 ? whole.format(value) : `${tenths.format(value / 1e6)} M`;
  }

  function rate(value) {
    if (value > 0 && value < 0.05) return "< 0.1";
    return value > 0 && value < 10 ? tenths.format(value) : count(value);
  }

  function share(part, total) {
    if (!isNumber(part) || !(total > 0)) return NONE;
    const percent = (100 * part) / total;
    if (percent > 0 && percent < 0.1) return "< 0.1 %";
    return `${(percent > 0 && percent < 10 ? tenths : whole).format(percent)} %`;
  }

  /** Give a duration as [number, unit]. */
  function durationParts(seconds) {
    if (!isNumber(seconds)) return [NONE, ""];
    const short = (value) => (value < 9.95 ? tenths : whole).format(value);
    if (seconds < 0.9995e-3) return [whole.format(seconds * 1e6), "µs"];
    if (seconds < 0.9995) return [short(seconds * 1e3), "ms"];
    if (seconds < 100) return [seconds.toFixed(seconds < 10 ? 2 : 1), "s"];
    return seconds < 6000 ? [short(seconds / 60), "min"] : [short(seconds / 3600), "h"];
  }
  const duration = (seconds) => durationParts(seconds).join(" ").trim();

  /** Tell how long something goes on by now: in whole seconds, which is calm to look at. */
  function elapsed(seconds) {
    if (!isNumber(seconds)) return NONE;
    if (seconds < 1) return "< 1 s";
    const [days, hours] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24];
    const [minutes, rest] = [Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)];
    if (days) return `${days} d ${hours} h`;
    if (hours) return `${hours} h ${minutes} min`;
    return minutes ? `${minutes} min ${rest} s` : `${rest} s`;
  }

  /**
   * Read a percentile from counts by upper bound in microseconds (powers of two).
   * Within a bucket the logarithm is taken to be even, as the buckets are.
   */
  function percentile(histogram, wanted) {
    const buckets = Object.entries(histogram || {}).map(([bound, n]) => [Number(bound), n])
      .filter(([bound, n]) => bound > 0 && n > 0).sort((a, b) => a[0] - b[0]);
    let left = sumOf(buckets.map(([, n]) => n)) * wanted;
    for (const [bound, n] of buckets) {
      if (left <= n) return (bound <= 1 ? left / n : (bound / 2) * 2 ** (left / n)) / 1e6;
      left -= n;
    }
    return null;
  }

  const functionsOf = (node) => listOf(node.status && node.status.functions);
  const callsOf = ({ done, failed }) => sumOf([done, failed]);

  /** Give what a daemon has done and what failed; what it is asked about itself is no work. */
  function endedOf(status) {
    const { functions, totals } = status || {};
    if (!Array.isArray(functions)) return totals || {}; // An older daemon.
    return { done: sumOf(functions.map(({ done }) => done)), failed: sumOf(functions.map(({ failed }) => failed)) };
  }

  /** Sum what all daemons tell of their functions, by name. */
  function sumFunctions(nodes) {
    const sums = new Map();
    const add = (into, record) => {
      for (const [key, n] of Object.entries(record || {})) into.set(key, (into.get(key) || 0) + n);
    };
    for (const entry of nodes.flatMap(functionsOf)) {
      const name = String(entry.name);
      if (!sums.has(name)) sums.set(name, { done: 0, failed: 0, seconds: null, errors: new Map(), latency: new Map() });
      const sum = sums.get(name);
      sum.done += entry.done || 0;
      sum.failed += entry.failed || 0;
      if (isNumber(entry.seconds)) sum.seconds += entry.seconds;
      add(sum.errors, entry.errors);
      add(sum.latency, entry.latency);
    }
    return [...sums].map(([name, { done, failed, seconds, errors, latency }]) => ({
      name, done, failed, calls: done + failed,
      share: done + failed ? failed / (done + failed) : null,
      mean: done + failed && seconds !== null ? seconds / (done + failed) : null,
      p50: percentile(Object.fromEntries(latency), 0.5),
      p95: percentile(Object.fromEntries(latency), 0.95),
      errors: [...errors].sort((a, b) => b[1] - a[1]), codes: errors.size,
    }));
  }

  /**
   * Give calls per second by function, between two notes {seconds, nodes}. Of a
   * daemon that came, went or began anew in between nothing is counted.
   */
  function callRates(before, after) {
    const rates = new Map();
    const span = before && after ? after.seconds - before.seconds : 0;
    for (const node of span > 0 ? after.nodes : []) {
      const other = before.nodes.find(({ name }) => name === node.name);
      if (!other || !other.status) continue;
      const earlier = new Map(functionsOf(other).map((entry) => [String(entry.name), callsOf(entry)]));
      for (const entry of functionsOf(node)) {
        const more = callsOf(entry) - (earlier.get(String(entry.name)) || 0);
        if (more >= 0) rates.set(String(entry.name), (rates.get(String(entry.name)) || 0) + more / span);
      }
    }
    return rates;
  }

  /** Order rows by a column; what has no value is last, equals are by name. */
  function ordered(rows, key, isDescending) {
    const sign = isDescending ? -1 : 1;
    const byName = (a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0);
    return [...rows].sort((a, b) => {
      if (key === "name") return sign * byName(a, b);
      if (!isNumber(a[key]) || !isNumber(b[key])) return isNumber(b[key]) - isNumber(a[key]) || byName(a, b);
      return sign * (a[key] - b[key]) || byName(a, b);
    });
  }

  /** Give all failures, the newest first; null if no daemon tells any. */
  function allFailures(nodes) {
    const told = nodes.filter(({ failures }) => Array.isArray(failures));
    const seen = new Map();
    const failures = told.flatMap((node) => node.failures.map((failure) => {
      // Two may be alike in everything; they are told apart by how many came before.
      const alike = JSON.stringify([node.name, failure.at, failure.function, failure.worker, failure.code]);
      seen.set(alike, (seen.get(alike) || 0) + 1);
      return { ...failure, node: node.name, key: `${alike}${seen.get(alike)}` };
    }));
    return told.length ? failures.sort((a, b) => b.at - a.at) : null;
  }

  /** Add a sample, and let go of those that the plots no longer show. */
  function extended(samples, sample) {
    const last = samples[samples.length - 1];
    if (!sample || !isNumber(sample.at) || (last && sample.at === last.at)) return samples;
    // The server's clock was put back: what was before can no longer be placed.
    if (last && sample.at < last.at) return [sample];
    return [...samples.filter(({ at }) => at >= sample.at - WINDOW_SECONDS - 5), sample].slice(-2000);
  }

  /** Part [time, value] points into runs: a missing value or a long time without any ends one. */
  function runs(points, longest) {
    const parts = [];
    let before = null;
    for (const [at, value] of points) {
      if (isNumber(value)) {
        if (before === null || at - before > longest) parts.push([]);
        parts[parts.length - 1].push([at, value]);
      }
      before = isNumber(value) ? at : null;
    }
    return parts;
  }

  /** Give even ticks from 0 on, in steps of 1 at least, up to or above the highest value. */
  function evenTicks(highest) {
    const rough = Math.max(highest, 1) / 3;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max(1, [1, 2, 5, 10].find((factor) => factor * power >= rough) * power);
    return Array.from({ length: Math.ceil(Math.max(highest, step) / step - 1e-9) + 1 }, (_, i) => i * step);
  }

  /** Give powers of ten around all values: at least a decade. */
  function decades(lowest, highest) {
    const first = Math.floor(Math.log10(lowest) + 1e-9);
    const last = Math.max(first + 1, Math.ceil(Math.log10(highest) - 1e-9));
    return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
  }

  /** Give how long to wait before the next attempt: full jitter, so that not all pages come at once. */
  const retryDelay = (attempt, drawn) => 0.25 + drawn * Math.min(RETRY_CAP, 2 ** attempt);

  if (typeof document === "undefined") {
    // Tried by itself, in Node.js.
    if (typeof module === "object") {
      module.exports = {
        visible, count, rate, share, duration, elapsed, percentile, endedOf, sumFunctions, callRates,
        ordered, allFailures, extended, runs, evenTicks, decades, retryDelay,
      };
    }
    return;
  }

  // ---------------------------------------------------------------- elements

  const byId = (id) => document.getElementById(id);

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const makeText = (tag, text, className = "") => make(tag, { class: `text ${className}`.trim(), dir: "auto" }, text);
  const draw = (tag, attributes = {}, ...children) => (
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children));
  const drawShape = (name) => draw("svg", { class: "shape", "aria-hidden": "true" }, draw("use", { href: `#shape-${name}` }));

  // What has not changed is not written: the page stays quick, and selections stay.
  function setText(node, text) {
    if (node.textContent !== text) node.textContent = text;
  }
  function set(node, name, value) {
    if (value === null) node.removeAttribute(name);
    else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  }
  const setShape = (svg, name) => set(svg.firstElementChild, "href", `#shape-${name}`);

  /** Keep one child for each item, by key, in the order of the items. */
  function keyedList(parent, makeChild, update) {
    const children = new Map();
    return (items, keyOf) => {
      const focused = document.activeElement;
      const keys = new Set(items.map(keyOf));
      for (const [key, child] of children) {
        if (!keys.has(key)) child.node.remove();
        if (!keys.has(key)) children.delete(key);
      }
      let place = parent.firstElementChild;
      for (const item of items) {
        const key = keyOf(item);
        if (!keys.delete(key)) continue; // Seen before: of two alike the first is shown.
        if (!children.has(key)) children.set(key, makeChild(item));
        const child = children.get(key);
        if (child.node === place) place = place.nextElementSibling;
        else parent.insertBefore(child.node, place);
        update(child, item);
      }
      // What is moved loses the focus.
      if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
    };
  }

  function remembered(key, value) {
    try {
      if (value !== undefined) localStorage.setItem(key, value);
      return localStorage.getItem(key);
    } catch {
      return null; // Storage may be forbidden; then nothing is kept.
    }
  }

  const THEMES = ["auto", "light", "dark"];
  let theme = THEMES.includes(remembered("taskd-theme")) ? remembered("taskd-theme") : "auto";
  function applyTheme() {
    set(document.documentElement, "data-theme", theme === "auto" ? null : theme);
    if (byId("theme")) setText(byId("theme"), `Theme: ${theme}`);
  }

  const clock = (at) => new Date(at * 1000).toLocaleTimeString();

  // ---------------------------------------------------------------- plots

  /**
   * Make a plot over the last minutes; gives what draws samples on it.
   *
   * series: [{tone, word, of: sample → number or null, hasArea}]; format: number → text;
   * isLog: the values are durations, on a logarithmic scale.
   */
  function makePlot(figure, { title, unit, series, format, isLog = false }) {
    const text = draw("desc", { id: `${figure.id}-text` });
    const grid = draw("g");
    const thread = draw("line", { class: "thread" });
    const paths = series.map(({ tone, hasArea }) => ({
      area: draw("path", { class: hasArea ? `area tone-${tone}` : "area" }),
      line: draw("path", { class: `line tone-${tone}` }),
      dot: draw("circle", { class: `dot tone-${tone}` }),
    }));
    const svg = draw(
      "svg", { role: "img", "aria-labelledby": `${figure.id}-name`, "aria-describedby": text.id },
      draw("title", { id: `${figure.id}-name` }, title), text, grid,
      ...paths.map(({ area }) => area), ...paths.map(({ line }) => line), thread, ...paths.map(({ dot }) => dot),
    );
    const reader = make("div", {
      class: "reader", role: "slider", tabindex: "0", "aria-label": `${title}: read at a time`,
      "aria-valuemin": "0", "aria-valuemax": "0", "aria-valuenow": "0", "aria-valuetext": "now",
    });
    const stage = make("div", { class: "stage" }, svg, reader);
    const moment = make("span", { class: "moment" });
    const values = series.map(() => make("b"));
    const legend = series.map(({ tone, word }, i) => make(
      "li", {}, draw("svg", { class: "swatch", viewBox: "0 0 20 8", "aria-hidden": "true" }, draw("path", { class: `line tone-${tone}`, d: "M1 4H19" })),
      `${word} `, values[i],
    ));
    figure.append(make("figcaption", {}, make("h3", {}, title), moment), make("ul", { class: "legend" }, ...legend), stage);

    let [samples, interval, now] = [[], 1, 0];
    let readAt = null; // The time under the pointer or the arrow keys.
    let describedAt = -Infinity;
    let span = { left: 0, right: 1 }; // Where the plot is, in pixels.
    const nearest = (at) => samples.reduce((best, sample, i) => (
      Math.abs(sample.at - at) < Math.abs(samples[best].at - at) ? i : best), 0);

    /** Give the scales for what is shown: ticks with labels, and where a time and a value are. */
    function scales(shown, em) {
      const all = shown.flatMap((sample) => series.map(({ of }) => of(sample))).filter((v) => isNumber(v) && (v > 0 || !isLog));
      const logTicks = () => (all.length ? decades(Math.min(...all), Math.max(...all)) : decades(1e-3, 1));
      const ticks = isLog ? logTicks() : evenTicks(Math.max(0, ...all));
      const labels = ticks.map((tick) => (isLog ? duration(tick).replace(/\.0+(?= )/, "") : count(tick)));
      const [low, high] = [ticks[0], ticks[ticks.length - 1]];
      const left = em * (0.62 * Math.max(...labels.map((label) => label.length)) + 0.8);
      const [right, top, bottom] = [stage.clientWidth - em * 0.5, em * 0.6, stage.clientHeight - em * 1.7];
      const part = (v) => (isLog ? Math.log(Math.max(v, low) / low) / Math.log(high / low) : v / high);
      return {
        ticks, labels, left, right, top, bottom,
        x: (at) => right - ((now - at) / WINDOW_SECONDS) * (right - left),
        y: (v) => bottom - part(v) * (bottom - top),
      };
    }

    function drawGrid({ ticks, labels, left, right, top, bottom, x, y }, em) {
      const every = Math.ceil((ticks.length * em * 1.5) / (bottom - top)); // Dense ticks go without a label.
      const label = (at, height, anchor, words) => draw("text", { x: at, y: height, "text-anchor": anchor }, words);
      grid.replaceChildren(
        ...ticks.map((tick, i) => draw("line", { class: i ? "grid" : "base", x1: left, x2: right, y1: y(tick), y2: y(tick) })),
        ...ticks.map((tick, i) => label(left - em * 0.5, y(tick) + em * 0.35, "end", i % every ? "" : labels[i])),
        ...[5, 4, 3, 2, 1, 0].flatMap((ago) => {
          const at = x(now - ago * 60);
          const words = { 5: "5 min ago", 0: "now" }[ago] || String(ago);
          return [
            draw("line", { class: "grid", x1: at, x2: at, y1: bottom, y2: bottom + em * 0.35 }),
            label(Math.max(at, em * 2.6), bottom + em * 1.45, ago ? "middle" : "end", words), // The first is long.
          ];
        }),
      );
    }

    function redraw() {
      if (!stage.clientWidth || !stage.clientHeight) return;
      const em = parseFloat(getComputedStyle(stage).fontSize) * 0.75;
      const shown = samples.filter(({ at }) => at >= now - WINDOW_SECONDS);
      const scale = scales(shown, em);
      const { left, right, top, bottom, x, y } = scale;
      span = { left, right };
      set(svg, "viewBox", `0 0 ${stage.clientWidth} ${stage.clientHeight}`);
      drawGrid(scale, em);
      const place = ([at, v]) => `${x(at).toFixed(1)} ${y(v).toFixed(1)}`;
      const foot = ([at]) => `${x(at).toFixed(1)} ${bottom.toFixed(1)}`;
      const read = samples[readAt === null ? samples.length - 1 : nearest(readAt)];
      paths.forEach(({ area, line, dot }, i) => {
        const { of, hasArea } = series[i];
        const parts = runs(shown.map((sample) => [sample.at, of(sample)]), GAP_INTERVALS * interval);
        // A single point is a line of no length, which a round cap makes visible.
        set(line, "d", parts.map((run) => `M${run.map(place).join("L")}${run.length > 1 ? "" : "h.01"}`).join(""));
        set(area, "d", hasArea ? parts.map((run) => `M${foot(run[0])}L${run.map(place).join("L")}L${foot(run[run.length - 1])}Z`).join("") : "");
        const v = read ? of(read) : null;
        setText(values[i], format(v));
        set(dot, "visibility", isNumber(v) ? "visible" : "hidden");
        set(dot, "cx", isNumber(v) ? x(read.at) : 0);
        set(dot, "cy", isNumber(v) ? y(v) : 0);
      });
      setText(moment, readAt === null || !read ? unit : clock(read.at));
      set(thread, "visibility", readAt === null ? "hidden" : "visible");
      for (const [name, v] of Object.entries({ x1: read ? x(read.at) : 0, x2: read ? x(read.at) : 0, y1: top, y2: bottom })) set(thread, name, v);
      set(reader, "aria-valuemax", Math.max(0, samples.length - 1));
      describe(shown);
    }

    // Not each second: some readers tell every change.
    function describe(shown) {
      if (!shown.length || Math.abs(now - describedAt) < SUMMARY_SECONDS) return;
      describedAt = now;
      const told = series.map(({ word, of }) => {
        const all = shown.map(of).filter(isNumber);
        return all.length ? `${word}: ${format(all[all.length - 1])} now, from ${format(Math.min(...all))} to ${format(Math.max(...all))}` : `${word}: nothing`;
      });
      setText(text, `${title}, ${unit}, over the last five minutes. ${told.join("; ")}.`);
    }

    function readFrom(at) {
      readAt = at;
      const i = at === null ? samples.length - 1 : nearest(at);
      set(reader, "aria-valuenow", Math.max(0, i));
      if (samples[i]) set(reader, "aria-valuetext", `${clock(samples[i].at)}: ${series.map(({ word, of }) => `${word} ${format(of(samples[i]))}`).join(", ")}`);
      redraw();
    }
    reader.addEventListener("pointermove", (event) => {
      const inside = (event.clientX - reader.getBoundingClientRect().left - span.left) / (span.right - span.left);
      readFrom(now - (1 - Math.min(1, Math.max(0, inside))) * WINDOW_SECONDS);
    });
    for (const kind of ["pointerleave", "blur", "focus"]) reader.addEventListener(kind, () => readFrom(null));
    reader.addEventListener("keydown", (event) => {
      const last = samples.length - 1;
      const i = readAt === null ? last : nearest(readAt);
      const to = {
        ArrowLeft: i - 1, ArrowDown: i - 1, ArrowRight: i + 1, ArrowUp: i + 1,
        PageDown: i - 30, PageUp: i + 30, Home: 0, End: last, Escape: null,
      }[event.key];
      if (to === undefined || last < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      readFrom(to === null ? null : samples[Math.min(last, Math.max(0, to))].at);
    });
    new ResizeObserver(redraw).observe(stage);
    return (view) => { ({ samples, interval, now } = view); redraw(); };
  }

  const latencyOf = (name) => (sample) => (sample.latency && isNumber(sample.latency[name]) ? sample.latency[name] : null);
  const makePlots = () => [
    makePlot(byId("plot-throughput"), {
      title: "Throughput", unit: "tasks per second", format: rate, series: [
        { tone: "done", word: "done", of: ({ done }) => done, hasArea: true },
        { tone: "failed", word: "failed", of: ({ failed }) => failed },
      ],
    }),
    makePlot(byId("plot-queue"), {
      title: "Queue depth", unit: "waiting tasks", format: count,
      series: [{ tone: "queue", word: "waiting", of: ({ waiting }) => waiting, hasArea: true }],
    }),
    makePlot(byId("plot-latency"), {
      title: "Latency", unit: "logarithmic scale", format: duration, isLog: true,
      series: ["p50", "p95", "p99"].map((name) => ({ tone: name, word: name, of: latencyOf(name) })),
    }),
  ];

  // ---------------------------------------------------------------- workers

  const workersOf = (node) => listOf(node.status && node.status.workers);
  const stateOf = ({ state }) => (STATES.includes(state) ? state : "unknown");
  const taskTime = (worker, passed) => elapsed(isNumber(worker.task_seconds) ? worker.task_seconds + passed : null);

  function describeWorker(worker, nodeName, passed) {
    return [
      `Worker ${worker.worker}${nodeName && ` of ${visible(nodeName, 80)}`}`,
      isNumber(worker.pid) && `process ${worker.pid}`,
      visible(worker.state, 30) + (worker.task ? `, runs ${visible(worker.task, 300)} for ${taskTime(worker, passed)}` : ""),
      worker.in_flight > 1 && `${count(worker.in_flight)} tasks at a time`,
      isNumber(worker.done) && `${count(worker.done)} done, ${count(worker.failed)} failed`,
      isNumber(worker.connections) && `${count(worker.connections)} connection${worker.connections === 1 ? "" : "s"}`,
      isNumber(worker.uptime) && `up for ${elapsed(worker.uptime)}`,
    ].filter(Boolean).join(" · ");
  }

  function makeTile() {
    const [shape, no, word, time] = [drawShape("unknown"), ...["no", "word", "for"].map((name) => make("span", { class: name }))];
    const task = makeText("span", "", "task");
    const attributes = { type: "button", class: "tile", tabindex: "-1", "aria-describedby": "worker-detail" };
    const tile = make("button", attributes, shape, no, word, time, task);
    return { node: make("li", {}, tile), tile, shape, no, word, time, task };
  }

  function updateTile({ tile, shape, no, word, time, task }, { worker, nodeName }) {
    const state = stateOf(worker);
    const more = worker.in_flight > 1 ? ` +${worker.in_flight - 1}` : "";
    const runsWhat = worker.task ? visible(worker.task, 80) + more : "";
    Object.assign(tile, { taskdWorker: worker, taskdNode: nodeName, taskdTime: time });
    set(tile, "data-state", state);
    set(tile, "data-worker", worker.worker);
    setShape(shape, state);
    setText(no, String(worker.worker));
    setText(word, visible(worker.state, 12));
    setText(task, runsWhat);
    // Without the time: a name that changes each second would be read each second.
    set(tile, "aria-label", `Worker ${worker.worker}, ${visible(worker.state, 30)}${runsWhat && `, runs ${runsWhat}`}`);
  }

  function makeNode() {
    const [title, wrong] = [make("h3", {}, makeText("span", "")), makeText("p", "", "wrong")];
    const list = make("ul", { class: "tiles", role: "list" });
    return { node: make("div", { class: "node" }, title, wrong, list), title, wrong, list, update: keyedList(list, makeTile, updateTile) };
  }

  function updateNode({ node: box, title, wrong, list, update }, { node, isOnly, total }) {
    const name = visible(node.name, 80);
    set(box, "data-node", name);
    title.hidden = isOnly;
    setText(title.firstChild, name);
    wrong.hidden = !node.error;
    setText(wrong, node.error ? `✕ away: ${visible(node.error, 300)}` : "");
    set(list, "aria-label", isOnly ? "Workers" : `Workers of ${name}`);
    set(list, "class", ["tiles", total > CROWD && "crowd", total > MANY && "many", node.error && "stale"].filter(Boolean).join(" "));
    const workers = [...workersOf(node)].sort((a, b) => a.worker - b.worker);
    update(workers.map((worker) => ({ worker, nodeName: isOnly ? "" : node.name })), ({ worker }) => worker.worker);
  }

  function makeWorkers() {
    const [host, detail, longest] = ["nodes", "worker-detail", "longest"].map(byId);
    const hint = detail.textContent;
    const update = keyedList(host, makeNode, updateNode);
    const tiles = () => [...host.querySelectorAll(".tile")];
    const tileOf = ({ target }) => target.closest(".tile");
    let picked = null; // The tile that is told of in the line below.
    let passed = () => 0; // Seconds since the workers were heard of

    function tick() {
      for (const { taskdTime, taskdWorker } of tiles()) setText(taskdTime, taskdWorker.task ? taskTime(taskdWorker, passed()) : "");
      if (picked && !picked.isConnected) picked = null;
      setText(detail, picked ? describeWorker(picked.taskdWorker, picked.taskdNode, passed()) : hint);
    }

    // All tiles are one stop of the Tab key; the arrow keys go among them.
    function pick(tile) {
      for (const other of host.querySelectorAll('.tile[tabindex="0"]')) set(other, "tabindex", "-1");
      if (picked) picked.classList.remove("picked");
      picked = tile;
      tile.classList.add("picked");
      set(tile, "tabindex", "0");
      tick();
    }
    for (const kind of ["focusin", "click", "pointerover"]) {
      host.addEventListener(kind, (event) => {
        // What the keyboard has is not taken away by a pointer that rests somewhere.
        const isTaken = kind === "pointerover" && host.contains(document.activeElement);
        if (tileOf(event) && !isTaken) pick(tileOf(event));
      });
    }
    host.addEventListener("keydown", (event) => {
      const [tile, all] = [tileOf(event), tiles()];
      if (!tile || event.ctrlKey || event.altKey || event.metaKey) return;
      const { left, top } = tile.getBoundingClientRect();
      const nextRow = (sign) => all.map((other) => [other, other.getBoundingClientRect()])
        .filter(([, box]) => sign * (box.top - top) > 1)
        .sort(([, a], [, b]) => sign * (a.top - b.top) || Math.abs(a.left - left) - Math.abs(b.left - left))
        .map(([other]) => other)[0];
      const to = {
        ArrowRight: () => all[all.indexOf(tile) + 1], ArrowLeft: () => all[all.indexOf(tile) - 1],
        ArrowDown: () => nextRow(1), ArrowUp: () => nextRow(-1), Home: () => all[0], End: () => all[all.length - 1],
      }[event.key];
      if (!to) return;
      event.preventDefault();
      if (to()) to().focus();
    });

    function render(nodes, newPassed) {
      passed = newPassed;
      const hadFocus = host.contains(document.activeElement);
      const all = nodes.flatMap(workersOf);
      byId("nodes-empty").hidden = nodes.length > 0;
      update(nodes.map((node) => ({ node, isOnly: nodes.length === 1, total: all.length })), ({ node }) => node.name);
      const first = host.querySelector('.tile[tabindex="0"]') || host.querySelector(".tile");
      if (first) set(first, "tabindex", "0");
      if (first && hadFocus && !host.contains(document.activeElement)) first.focus(); // The one that had it is gone.
      const slowest = all.filter(({ task }) => task).reduce((a, b) => (a && a.task_seconds >= b.task_seconds ? a : b), null);
      longest.hidden = !slowest || !(slowest.task_seconds >= 1);
      if (!longest.hidden) {
        longest.replaceChildren(`Longest: worker ${slowest.worker}, `, makeText("span", visible(slowest.task, 80)), `, ${elapsed(slowest.task_seconds)}`);
      }
      tick();
    }
    return { render, tick };
  }

  /** Give how many workers are in each state: as the sample says, or an older daemon's list. */
  function workerCounts(sample, nodes) {
    if (sample && sample.workers) return sample.workers;
    const all = nodes.flatMap(workersOf);
    return Object.fromEntries([...STATES, "unknown"].map((state) => [state, all.filter((worker) => stateOf(worker) === state).length]));
  }

  function renderStates(workers) {
    const host = byId("states");
    if (!host.childElementCount) {
      host.append(...STATES.map((state) => make("li", { "data-state": state }, drawShape(state), `${state} `, make("b"))));
    }
    STATES.forEach((state, i) => setText(host.children[i].lastChild, count(workers[state] || 0)));
  }

  // ---------------------------------------------------------------- tables

  /** Give what shows the first rows of a long list, or all of it once asked. */
  function makeMore(button, many, few, changed) {
    const first = matchMedia("(max-width: 44rem)").matches ? few : many;
    let isWhole = false;
    button.addEventListener("click", () => { isWhole = !isWhole; changed(); });
    return (all) => {
      button.hidden = all.length <= first;
      set(button, "aria-expanded", isWhole);
      setText(button, isWhole ? `Show the first ${first} only` : `Show all ${all.length}`);
      return isWhole ? all : all.slice(0, first);
    };
  }

  const COLUMNS = [
    ["Per second", (row) => rate(row.rate)], ["Done", ({ done }) => count(done)], ["Failed", ({ failed }) => count(failed)],
    ["Failed share", ({ failed, calls }) => share(failed, calls)], ["Mean", ({ mean }) => duration(mean)],
    ["About p50", ({ p50 }) => duration(p50)], ["About p95", ({ p95 }) => duration(p95)],
  ];

  function makeFunction({ name }) {
    const cells = COLUMNS.map(([label]) => make("td", { role: "cell", class: "num", "data-label": label }));
    const codes = make("td", { role: "cell", class: "codes", "data-label": "Error codes" });
    const head = make("th", { role: "rowheader", scope: "row" }, makeText("span", visible(name, 120)));
    return { node: make("tr", { role: "row" }, head, ...cells, codes), cells, codes, known: null };
  }

  function updateFunction(child, row) {
    COLUMNS.forEach(([, format], i) => setText(child.cells[i], format(row)));
    for (const i of [2, 3]) child.cells[i].classList.toggle("bad", row.share >= BAD_SHARE);
    if (child.known === String(row.errors)) return;
    child.known = String(row.errors);
    const codes = row.errors.slice(0, 8).flatMap(([code, n], i) => [i ? ", " : "", makeText("span", visible(code, 40), "code"), `\u00A0${count(n)}`]);
    child.codes.replaceChildren(...(codes.length ? codes : [NONE]), row.errors.length > 8 ? `, and ${row.errors.length - 8} more` : "");
  }

  function makeFunctions(changed) {
    const [table, filter, empty] = ["functions", "filter", "functions-empty"].map(byId);
    const update = keyedList(table.tBodies[0], makeFunction, updateFunction);
    const cut = makeMore(byId("functions-more"), 25, 8, changed);
    let [key, isDescending] = ["rate", true];
    table.tHead.addEventListener("click", ({ target }) => {
      if (!target.closest("button")) return;
      const chosen = target.closest("th").dataset.key;
      isDescending = key === chosen ? !isDescending : chosen !== "name";
      key = chosen;
      changed();
    });
    filter.addEventListener("input", changed);
    return (functions) => {
      for (const head of table.tHead.rows[0].cells) {
        set(head, "aria-sort", head.dataset.key !== key ? "none" : isDescending ? "descending" : "ascending");
      }
      const wanted = filter.value.trim().toLowerCase();
      const found = ordered(functions.filter(({ name }) => name.toLowerCase().includes(wanted)), key, isDescending);
      update(cut(found), ({ name }) => name);
      empty.hidden = found.length > 0;
      setText(empty, functions.length ? "No function has such a name." : "No function is known yet.");
      setText(byId("functions-note"), wanted ? `${found.length} of ${functions.length}` : `${functions.length} in all`);
    };
  }

  function failureTime(at) {
    const moment = new Date(at * 1000);
    if (!isNumber(at) || Number.isNaN(moment.getTime())) return NONE;
    const isToday = moment.toDateString() === new Date().toDateString();
    const full = moment.toISOString();
    return make("time", { datetime: full, title: full }, isToday ? moment.toLocaleTimeString() : moment.toLocaleString());
  }

  function failureMessage(message) {
    if (message.length <= BRIEF_TEXT) return makeText("span", visible(message));
    const summary = make("summary", {}, makeText("span", visible(message, BRIEF_TEXT), "brief"), " all of it");
    return make("details", {}, summary, makeText("p", visible(message)));
  }

  function makeFailure({ failure, isOnly }) {
    const cell = (name, ...children) => make("td", { role: "cell", class: name }, ...children);
    const type = failure.type ? [makeText("span", visible(failure.type, 120), "type"), " "] : [];
    const where = cell("worker", String(failure.worker ?? NONE), ...(isOnly ? [] : [" of ", makeText("span", visible(failure.node, 60))]));
    set(where, "data-label", "Worker");
    return { node: make(
      "tr", { role: "row" }, cell("when", failureTime(failure.at)),
      make("th", { role: "rowheader", scope: "row" }, makeText("span", visible(failure.function ?? NONE, 120))),
      cell("which", makeText("span", visible(failure.code ?? NONE, 60), "code")),
      cell("message", ...type, failureMessage(String(failure.message ?? ""))), where,
    ) };
  }

  function makeFailures(changed) {
    const update = keyedList(byId("failures").tBodies[0], makeFailure, () => {});
    const cut = makeMore(byId("failures-more"), 15, 8, changed);
    return (nodes) => {
      const failures = allFailures(nodes);
      const shown = cut(failures || []);
      update(shown.map((failure) => ({ failure, isOnly: nodes.length === 1 })), ({ failure }) => failure.key);
      byId("failures-empty").hidden = shown.length > 0;
      setText(byId("failures-empty"), failures || !nodes.length ? "No failure is known." : "They are not told: not allowed, or not known to the daemon.");
      setText(byId("failures-note"), shown.length ? `the last ${failures.length}` : "");
    };
  }

  // ---------------------------------------------------------------- daemons, key figures

  function makeCard() {
    const [title, list] = [makeText("h3", ""), make("dl")];
    return { node: make("div", { class: "card" }, title, list), title, list, known: null };
  }

  function updateCard(child, { title, facts }) {
    const told = facts.filter(([, value]) => value);
    setText(child.title, title);
    if (child.known === String(told)) return;
    child.known = String(told);
    child.list.replaceChildren(...told.flatMap(([word, value]) => [make("dt", {}, word), makeText("dd", value)]));
  }

  function daemonFacts({ status, error }) {
    const { version } = status || {};
    const [supervisor, queue, totals] = ["supervisor", "queue", "totals"].map((part) => (status && status[part]) || {});
    const { pid, uptime, reload } = supervisor;
    const ended = endedOf(status);
    const restarts = Object.entries(totals.restarts || {}).filter(([, n]) => n > 0);
    return [
      ["State", error ? `away: ${visible(error, 300)}` : status ? "answers" : "not heard of yet"],
      ["Version", version && visible(version, 40)],
      ["Supervisor", pid && `process ${pid}, up for ${elapsed(uptime)}`],
      ["Last reload", reload && `${elapsed(reload.seconds_ago)} ago, ${reload.failure ? `failed: ${visible(reload.failure, 300)}` : "went well"}`],
      ["Tasks", isNumber(ended.done) && `${count(ended.done)} done, ${count(ended.failed)} failed`],
      ["Connections", isNumber(totals.connections) && count(totals.connections)],
      ["Queue", isNumber(queue.refused) && `${count(queue.refused)} refused, ${count(queue.expired)} expired`],
      ["Replaced workers", restarts.map(([cause, n]) => `${visible(cause, 30)} ${count(n)}`).join(", ")],
    ];
  }

  function gatewayFacts(gateway, version) {
    const words = { processes: "Processes", websockets: "WebSockets", in_flight: "In flight", messages: "Messages", refused: "Refused" };
    const told = Object.entries(words).map(([name, word]) => [word, gateway && isNumber(gateway[name]) && count(gateway[name])]);
    return [["Version", version && visible(version, 40)], ...told];
  }

  function setFigure(id, [number, unit], below, isAlarming = false) {
    const big = byId(id).querySelector(".big");
    if (big.textContent !== `${number}${unit && ` ${unit}`}`) {
      big.replaceChildren(number, ...(unit ? [make("span", { class: "unit" }, ` ${unit}`)] : []));
    }
    big.toggleAttribute("data-long", number.length + unit.length > 5);
    setText(byId(id).querySelector(".small"), below);
    byId(id).toggleAttribute("data-alarm", isAlarming);
  }

  function renderFigures(sample, nodes, workers) {
    const { done, failed, waiting, latency } = sample || {};
    const { p50, p95, p99 } = latency || {};
    const total = sumOf(Object.values(workers));
    const oldest = Math.max(0, ...nodes.map(({ status }) => (status && status.queue && status.queue.oldest_seconds) || 0));
    const ended = sumOf(nodes.map(({ status }) => endedOf(status).done));
    const others = STATES.filter((state) => state !== "busy" && workers[state]).map((state) => `${count(workers[state])} ${state}`);
    setFigure("fig-done", [rate(done), ""], ended ? `${count(ended)} since the start` : "");
    setFigure("fig-failed", [rate(failed), ""], done + failed > 0 ? `${share(failed, done + failed)} of what ended` : "", failed / (done + failed) >= ALARMING_SHARE);
    setFigure("fig-waiting", [count(waiting), ""], oldest ? `the oldest for ${elapsed(oldest)}` : waiting === 0 ? "nothing waits" : "");
    setText(byId("fig-busy").querySelector("dt"), total ? `Busy of ${count(total)} worker${total === 1 ? "" : "s"}` : "Busy workers");
    setFigure("fig-busy", [total ? count(workers.busy || 0) : NONE, ""], others.join(", ") || (total ? "none to spare" : ""));
    setFigure("fig-latency", durationParts(p95), isNumber(p50) ? `p50 ${duration(p50)}, p99 ${duration(p99)}` : "");
  }

  // ---------------------------------------------------------------- the page

  function start() {
    const live = {
      interval: 1, version: null, samples: [], sample: null, now: 0, nodes: [], gateway: null, notes: [],
      heard: null, // performance.now() of the last news
      heardAt: null, // and the same as a time of day
    };
    const link = { socket: null, is: "connecting", attempts: 0, retryAt: 0, timer: 0, openedAt: 0 };
    const lastKnown = new Map(); // What each daemon told before it went away.
    let frozen = null; // What is shown while paused.
    let isScheduled = false;
    let [spokenAt, spokenState] = [-Infinity, ""];
    const secondsSince = (moment) => (performance.now() - moment) / 1000;

    const plots = makePlots();
    const workersPart = makeWorkers();
    const updateCards = keyedList(byId("daemons"), makeCard, updateCard);
    const renderFunctions = makeFunctions(schedule);
    const renderFailures = makeFailures(schedule);

    function schedule() {
      if (isScheduled || document.hidden) return;
      isScheduled = true;
      requestAnimationFrame(() => { isScheduled = false; render(); });
    }

    function render() {
      const view = frozen || live;
      const { nodes, sample, notes } = view;
      const workers = workerCounts(sample, nodes);
      for (const plot of plots) plot(view);
      // A task ticks on between two messages, but not once the news are old.
      workersPart.render(nodes, () => (frozen || view.heard === null ? 0 : Math.min(secondsSince(view.heard), SILENT_INTERVALS * view.interval)));
      renderStates(workers);
      renderFigures(sample, nodes, workers);
      const rates = callRates(notes[0], notes[notes.length - 1]);
      renderFunctions(sumFunctions(nodes).map((sum) => ({ ...sum, rate: rates.get(sum.name) })));
      renderFailures(nodes);
      updateCards([
        ...nodes.map((node) => ({ key: `daemon ${node.name}`, title: visible(node.name, 80), facts: daemonFacts(node) })),
        { key: "gateway", title: "The gateway", facts: gatewayFacts(view.gateway, view.version) },
      ], ({ key }) => key);
      setText(byId("about"), nodes.length === 1 ? visible(nodes[0].name, 60) : nodes.length ? `${nodes.length} daemons` : "");
      renderLink();
      speak(sample, workers);
    }

    /** Tell what is wrong, if anything is: {kind, look, word, title, text, button}. */
    function trouble() {
      const away = live.nodes.filter(({ error }) => error);
      const asOf = live.heardAt ? ` What you see is from ${live.heardAt.toLocaleTimeString()}.` : "";
      if (link.is === "signin") {
        return { kind: "signin", look: "away", word: "signed out", title: "Sign in again.", text: `The gateway no longer knows who you are.${asOf}`, button: "Reload the page" };
      }
      if (link.is === "lost") {
        return { kind: "gateway", look: "away", word: "gateway away", title: "The gateway is away.", text: `Trying again by itself.${asOf}`, button: "Try now" };
      }
      if (live.heard !== null && secondsSince(live.heard) > SILENT_INTERVALS * live.interval) {
        return { kind: "silent", look: "wait", word: "no news", title: "The gateway is silent.", text: `The connection stands, but no news come.${asOf}`, button: "" };
      }
      if (!away.length) return null;
      const reason = visible(away[0].error, 400);
      if (away.length < live.nodes.length) {
        const title = `${away.length} of ${live.nodes.length} daemons away.`;
        return { kind: "some", look: "live", word: "live, in part", title, text: `${visible(away[0].name, 80)}: ${reason}`, button: "" };
      }
      const title = away.length > 1 ? "All daemons are away." : "The daemon is away.";
      return { kind: "daemon", look: "away", word: "daemon away", title, text: `The gateway answers: ${reason}`, button: "" };
    }

    function renderLink() {
      const fine = live.heard === null ? { kind: "connecting", look: "wait", word: "connecting" } : { kind: "live", look: "live", word: "live" };
      const wrong = trouble();
      const { kind, look, word, title, text, button } = wrong || fine;
      const isStale = wrong !== null && kind !== "some";
      const isPaused = frozen && !isStale;
      set(byId("link"), "data-look", isPaused ? "paused" : look);
      setShape(byId("link").firstElementChild, isPaused ? "paused" : look);
      setText(byId("link-text"), isPaused ? `paused at ${frozen.pausedAt}` : word);
      set(document.body, "data-link", kind);
      byId("main").classList.toggle("stale", isStale);
      byId("banner").hidden = !wrong;
      set(byId("banner"), "data-kind", wrong ? kind : "");
      setText(byId("banner-title"), title || "");
      setText(byId("banner-text"), text || "");
      setText(byId("banner-button"), button || "");
      byId("banner-button").hidden = !button;
      const left = Math.ceil(-secondsSince(link.retryAt));
      setText(byId("banner-retry"), kind !== "gateway" ? "" : link.timer && left > 0 ? `in ${left} s` : "now …");
      if (document.title !== (isStale ? `${word} – taskd` : "taskd")) document.title = isStale ? `${word} – taskd` : "taskd";
    }

    /** Tell the figures to those who listen: now and then, and when they are there again. */
    function speak(sample, workers) {
      const state = document.body.dataset.link;
      const isDue = state === "live" && (spokenState !== "live" || secondsSince(spokenAt) > SUMMARY_SECONDS);
      spokenState = state;
      if (!isDue || !sample || frozen) return;
      spokenAt = performance.now();
      setText(byId("summary"), `${count(workers.busy)} of ${count(sumOf(Object.values(workers)))} workers busy, ${count(sample.waiting)} tasks waiting, `
        + `${rate(sample.done)} done and ${rate(sample.failed)} failed per second, p95 ${duration(latencyOf("p95")(sample))}.`);
    }

    // ------------------------------------------------------------ the connection

    function hear(message) {
      if (message.kind === "hello") {
        live.version = message.version;
        live.interval = message.interval > 0 ? message.interval : 1;
        live.samples = listOf(message.history).reduce(extended, []);
        live.sample = live.samples[live.samples.length - 1] || null;
        live.now = live.sample ? live.sample.at : 0;
      } else if (message.kind === "now") {
        const { sample, nodes, gateway = null } = message;
        for (const { name, status } of listOf(nodes)) if (status) lastKnown.set(name, status);
        live.nodes = listOf(nodes).map((node) => ({ ...node, status: node.status || lastKnown.get(node.name) || null }));
        live.gateway = gateway;
        if (sample && isNumber(sample.at)) live.now = sample.at;
        // Of daemons that are all away nothing is known; the last figures stay, and are shown as old.
        if (sample && !(live.nodes.length && live.nodes.every(({ error }) => error))) {
          Object.assign(live, { sample, samples: extended(live.samples, sample) });
        }
        live.notes = [...live.notes, { seconds: performance.now() / 1000, nodes: listOf(nodes) }].slice(-RATE_SPAN - 1);
      } else return; // A newer gateway tells more than this page knows.
      Object.assign(live, { heard: performance.now(), heardAt: new Date() });
      schedule();
    }

    function connect() {
      clearTimeout(link.timer);
      const socket = new WebSocket((location.protocol === "https:" ? "wss://" : "ws://") + location.host + "/live");
      const whileMine = (act) => (event) => { if (link.socket === socket) act(event); };
      Object.assign(link, { socket, timer: 0 });
      socket.addEventListener("open", whileMine(() => {
        Object.assign(link, { is: "live", openedAt: performance.now() });
        Object.assign(live, { heard: performance.now(), notes: [] });
        schedule();
      }));
      socket.addEventListener("message", whileMine(({ data }) => hear(JSON.parse(data))));
      socket.addEventListener("close", whileMine(({ code }) => lose(code)));
    }

    function lose(code) {
      const { socket } = link;
      if (link.is === "live" && secondsSince(link.openedAt) > SETTLED_SECONDS) link.attempts = 0;
      const delay = retryDelay(link.attempts, Math.random()) * 1000;
      Object.assign(link, { socket: null, is: code === SIGN_IN_AGAIN ? "signin" : "lost", attempts: link.attempts + 1 });
      socket.close(); // It may be that only this end knows that it is dead.
      if (link.is === "lost") Object.assign(link, { retryAt: performance.now() + delay, timer: setTimeout(connect, delay) });
      schedule();
    }

    function tryNow() {
      if (link.is === "lost" && link.timer) connect();
      schedule();
    }

    // ------------------------------------------------------------ the controls

    function pause() {
      frozen = frozen ? null : { ...live, pausedAt: new Date().toLocaleTimeString() };
      set(byId("pause"), "aria-pressed", Boolean(frozen));
      schedule();
    }
    byId("pause").addEventListener("click", pause);
    byId("keys").checked = remembered("taskd-keys") !== "off";
    byId("keys").addEventListener("change", () => remembered("taskd-keys", byId("keys").checked ? "on" : "off"));
    document.addEventListener("keydown", (event) => {
      const isTyping = event.target.matches("input:not([type=checkbox])");
      const isPlain = !event.ctrlKey && !event.altKey && !event.metaKey && !event.repeat;
      if (event.key.toLowerCase() === "p" && byId("keys").checked && !isTyping && isPlain) pause();
    });
    byId("theme").addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      remembered("taskd-theme", theme);
      applyTheme();
    });
    byId("banner-button").addEventListener("click", () => (link.is === "signin" ? location.reload() : tryNow()));
    window.addEventListener("online", tryNow);
    document.addEventListener("visibilitychange", () => { if (!document.hidden) tryNow(); });
    setInterval(() => {
      if (link.is === "live" && secondsSince(live.heard) > Math.max(10, DEAD_INTERVALS * live.interval)) lose(null);
      if (document.hidden) return;
      renderLink();
      if (!frozen && link.is === "live") workersPart.tick();
    }, 500);

    applyTheme();
    connect();
    render();
  }

  applyTheme(); // Before anything is painted; the rest waits for the document.
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
