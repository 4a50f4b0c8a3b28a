"use strict";
// On top of a page that reads without it: sorting, filters, the slider, the charts. No text becomes markup here.
(() => {
  const PAGE = 200; // rows of a table shown at a time
  const $ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, facts = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), facts);
    node.append(...children);
    return node;
  };

  // --- tables ---
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const own = cell.textContent.trim();
    const text = cell.dataset.v ?? /^(-?\d+(?:\.\d+)?)(?:$| ±|–\d|[†‡§¶#])/.exec(own)?.[1] ?? own; // html.py has the same
    const number = Number(text);
    return text !== "" && Number.isFinite(number) ? number : text;
  };
  const isEmpty = (key) => key === "" || key === "–";
  const collator = new Intl.Collator(undefined, { numeric: true });
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return collator.compare(a, b);
  };
  const tables = $("table.sortable, table.primary").map((table) => {
    const rows = [...table.tBodies[0].rows];
    const heads = [...table.tHead.rows[0].cells];
    const names = heads.map((head) => head.textContent);
    const entry = { table, heads, rows, limit: PAGE, filtered: table.matches(".filtered, .primary") };
    const nfe = names.indexOf("NFE");
    const status = names.indexOf("status");
    for (const row of rows) {
      row.facts = {
        name: row.cells[0].textContent.toLowerCase(),
        nfe: nfe < 0 ? null : row.cells[nfe].textContent,
        status: status < 0 ? null : row.cells[status].textContent,
      };
    }
    entry.more = make("button", { type: "button", className: "more", hidden: true });
    entry.more.addEventListener("click", () => { entry.limit += 5 * PAGE; show(entry); });
    table.parentElement.after(entry.more);
    return entry;
  });
  const filters = document.getElementById("filters");
  const wanted = () => {
    const words = filters ? filters.text.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
    return { words, nfe: filters?.nfe.value ?? "", status: filters?.status.value ?? "" };
  };
  const hasWords = (name, words) => words.every((word) => name.includes(word));
  const passes = (facts, want) =>
    hasWords(facts.name, want.words) && (!want.nfe || facts.nfe === null || facts.nfe === want.nfe) &&
    (!want.status || facts.status === null || facts.status === want.status);
  function show(entry) {
    const want = wanted();
    const found = entry.filtered ? entry.rows.filter((row) => passes(row.facts, want)) : entry.rows;
    entry.table.tBodies[0].replaceChildren(...found.slice(0, entry.limit));
    const rest = found.length - entry.limit;
    entry.more.hidden = rest <= 0;
    entry.more.textContent = `Show more (${rest} rows are not shown)`;
    entry.found = found.length;
  }
  const sort = (entry, heading) => {
    const column = heading.cellIndex;
    const descending = heading.getAttribute("aria-sort") === "ascending";
    const keyed = entry.rows.map((row) => ({ row, key: keyOf(row, column) }));
    keyed.sort((a, b) => {
      if (isEmpty(a.key) !== isEmpty(b.key)) return isEmpty(a.key) ? 1 : -1;
      const order = compare(a.key, b.key);
      return descending ? -order : order;
    });
    entry.rows = keyed.map(({ row }) => row);
    for (const other of entry.heads) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    show(entry);
  };
  for (const entry of tables.filter(({ table }) => table.matches(".sortable"))) {
    for (const heading of entry.heads) {
      const button = make("button", { type: "button" }, ...heading.childNodes);
      button.addEventListener("click", () => sort(entry, heading));
      heading.append(button);
    }
  }
  const columns = (entry, nfe) => { // of a table methods x NFE
    entry.heads.forEach((head, i) => {
      const hide = i > 0 && nfe !== "" && head.textContent !== `NFE ${nfe}`;
      if (head.hidden === hide) return;
      head.hidden = hide;
      for (const row of [...entry.rows, ...(entry.table.tFoot?.rows ?? [])]) row.cells[i].hidden = hide;
    });
  };
  const refilter = () => {
    for (const entry of tables) {
      entry.limit = PAGE;
      if (entry.table.matches(".primary")) columns(entry, wanted().nfe);
      show(entry);
    }
    const full = tables.filter((entry) => entry.heads.at(-1).textContent === "status");
    const sum = (key) => full.reduce((total, entry) => total + key(entry), 0);
    if (filters) document.getElementById("count").textContent = `${sum((e) => e.found)} of ${sum((e) => e.rows.length)} rows`;
  };

  // --- samples ---
  for (const figure of $(".slides")) {
    const slider = figure.querySelector("input");
    const move = () => {
      const nfe = slider.dataset.budgets.split(",")[slider.value];
      figure.querySelector("output").textContent = nfe;
      slider.setAttribute("aria-valuetext", `NFE ${nfe}`);
      for (const slide of $(".slide", figure)) {
        const frames = $(".frame", slide);
        const shown = frames.find((frame) => frame.dataset.nfe === nfe) ?? frames.at(-1);
        for (const frame of frames) frame.hidden = frame !== shown;
      }
    };
    slider.addEventListener("input", move);
    move();
  }

  // --- charts ---
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const DASHES = [[], [8, 4], [2, 3], [8, 3, 2, 3]];
  const MOST = 12; // lines of a chart
  const letter = (i) => String.fromCharCode(65 + i);
  const round = (value) => (value === null ? "–" : Number(value.toPrecision(4)).toString());
  const select = (label, options) => {
    const node = make("select");
    for (const [value, text] of options) node.append(make("option", { value, textContent: text }));
    return [make("label", {}, `${label} `, node), node];
  };
  const extent = (values, log) => {
    const low = Math.min(...values);
    const high = Math.max(...values);
    if (log) return [low / 1.25, high * 1.25];
    const pad = (high - low || Math.abs(high) || 1) * 0.06;
    return [low - pad, high + pad];
  };

  // Ticks of a log scale: the points themselves where they are few, else 1, 2, 5 or powers of ten.
  const splits = (low, high, marks) => {
    if (marks.length > 1 && marks.length <= 6) return marks;
    const steps = high / low > 1e3 ? [1] : [1, 2, 5];
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) for (const m of steps) found.push(m * 10 ** e);
    return found.filter((value) => value >= low && value <= high);
  };

  // A chart of points {x, y, low, high, xlow, xhigh, text} by series {name, points}; redrawn by `draw(view)`.
  function Chart(root, words) {
    const plot = make("div", { className: "plot", tabIndex: 0 });
    plot.setAttribute("role", "img");
    const readout = make("output", { className: "readout" });
    readout.setAttribute("aria-live", "polite");
    const legend = make("div", { className: "legend" });
    legend.setAttribute("role", "group");
    legend.setAttribute("aria-label", "Shown methods");
    root.append(plot, readout, legend, make("p", { className: "notes", textContent: words }));
    const off = new Set();
    let view = null;
    let chart = null;
    let order = [];
    let at = -1;

    const say = (point) => { readout.textContent = point ? point.text : "Point at the chart, or focus it and press the arrow keys."; };
    const nearest = (u) => {
      const { left, top } = u.cursor;
      if (left < 0) return null;
      const gap = (p) => Math.hypot(u.valToPos(p.x, "x") - left, u.valToPos(p.y, "y") - top);
      return order.reduce((best, p) => (best === null || gap(p) < gap(best) ? p : best), null);
    };
    const line = (u, points, width, dash, colour) => {
      const { ctx } = u;
      ctx.save();
      ctx.strokeStyle = colour;
      ctx.lineWidth = width * devicePixelRatio;
      ctx.setLineDash(dash.map((part) => part * devicePixelRatio));
      ctx.beginPath();
      points.forEach(([x, y], i) => ctx[i ? "lineTo" : "moveTo"](u.valToPos(x, "x", true), u.valToPos(y, "y", true)));
      ctx.stroke();
      ctx.restore();
    };
    const overlay = (u) => {
      const [xmin, xmax] = [u.scales.x.min, u.scales.x.max];
      const { ctx } = u;
      ctx.save();
      ctx.beginPath();
      ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
      ctx.clip();
      if (view.floor !== null) line(u, [[xmin, view.floor], [xmax, view.floor]], 1, [3, 3], style("--soft"));
      view.front.forEach((p, i) => {
        const next = view.front[i + 1];
        line(u, [[p.x, p.y], [next ? next.x : xmax, p.y], ...(next ? [[next.x, next.y]] : [])], 4, [], style("--front"));
      });
      for (const one of view.shown) {
        for (const p of one.points) {
          if (p.low !== null && p.high !== null) line(u, [[p.x, Math.max(p.low, u.scales.y.min)], [p.x, p.high]], 1.2, [], one.colour);
          if (p.xlow != null && p.xhigh != null) line(u, [[p.xlow, p.y], [p.xhigh, p.y]], 1.2, [], one.colour);
        }
      }
      ctx.font = `bold ${12 * devicePixelRatio}px system-ui, sans-serif`;
      const ends = view.shown.map((one) => ({ one, x: u.valToPos(one.points.at(-1).x, "x", true), y: u.valToPos(one.points.at(-1).y, "y", true) }));
      ctx.textAlign = "left";
      ctx.textBaseline = "middle";
      let lowest = -Infinity;
      for (const { one, x, y } of ends.sort((a, b) => a.y - b.y)) { // letters never on top of each other
        lowest = Math.max(y, lowest + 13 * devicePixelRatio);
        ctx.fillStyle = one.colour;
        ctx.fillText(one.letter, x + 8 * devicePixelRatio, lowest);
      }
      ctx.restore();
    };
    const render = () => {
      chart?.destroy();
      plot.replaceChildren();
      view.shown = view.series.filter((one) => !off.has(one.name) && one.points.length);
      order = view.shown.flatMap((one) => one.points).sort((a, b) => a.x - b.x);
      at = -1;
      say(null);
      plot.setAttribute("aria-label", `${view.title}. ${view.shown.map((one) => `${one.letter} ${one.name}`).join(", ")}. The tables hold the numbers.`);
      if (!order.length) { plot.append(make("p", { textContent: "Nothing to draw: no shown method has both numbers." })); return; }
      view.front = pareto(order, view.higher);
      const xs = [...new Set(order.map((p) => p.x))].sort((a, b) => a - b);
      const index = new Map(xs.map((x, i) => [x, i]));
      const lines = view.shown.map((one) => {
        const found = Array(xs.length).fill(null);
        for (const p of one.points) found[index.get(p.x)] = p.y;
        return found;
      });
      const logX = xs[0] > 0 && !view.linearX;
      const ends = order.flatMap((p) => [p.y, p.high ?? p.y]).concat(view.floor === null ? [] : [view.floor]);
      const logY = Math.min(...ends) > 0 && !view.higher;
      const lows = order.map((p) => (logY && p.low !== null && p.low <= 0 ? p.y / 3 : p.low ?? p.y));
      const axis = (label, log, marks) => ({
        label, splits: log ? (u, i, low, high) => splits(low, high, marks) : undefined, filter: (_, found) => found, stroke: style("--text"), grid: { stroke: style("--line"), width: 1 }, ticks: { stroke: style("--line") },
        values: (_, splits) => splits.map((value) => (value === null ? "" : round(value))),
      });
      const scale = (values, log) => ({ time: false, distr: log ? 3 : 1, log: 10, range: () => extent(values, log) });
      chart = new uPlot({
        width: plot.clientWidth, height: Math.min(420, Math.max(280, plot.clientWidth * 0.6)),
        legend: { show: false }, cursor: { drag: { x: false, y: false }, points: { show: false } },
        scales: { x: scale(xs.concat(order.flatMap((p) => [p.xlow ?? p.x, p.xhigh ?? p.x])), logX), y: scale(ends.concat(lows), logY) },
        axes: [axis(view.x, logX, xs), { ...axis(view.y, logY, []), size: 64 }],
        series: [{}, ...view.shown.map((one) => ({
          stroke: one.colour, width: 1.8, dash: one.dash, spanGaps: true, points: { show: true, size: 6, fill: one.colour },
        }))],
        hooks: { drawSeries: [], draw: [overlay], setCursor: [(u) => { if (u.cursor.left >= 0) say(nearest(u)); }] },
      }, [xs, ...lines], plot);
    };
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !order.length) return;
      event.preventDefault();
      at = (at + step + order.length) % order.length;
      say(order[at]);
      chart.setCursor({ left: chart.valToPos(order[at].x, "x"), top: chart.valToPos(order[at].y, "y") });
    });
    let width = 0;
    new ResizeObserver(() => { if (view && plot.clientWidth !== width) { width = plot.clientWidth; render(); } }).observe(plot);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view && this.draw(view));
    this.draw = (next) => {
      view = { front: [], ...next };
      view.series = view.series.filter((one) => one.points.length);
      const hidden = view.series.length - MOST;
      view.series = view.series.slice(0, MOST);
      view.series.forEach((one, i) => Object.assign(one, { letter: letter(i), colour: style(`--s${i % 6}`), dash: DASHES[i % 4] }));
      legend.replaceChildren(...view.series.map((one) => {
        const box = make("input", { type: "checkbox", checked: !off.has(one.name) });
        box.addEventListener("change", () => { if (box.checked) off.delete(one.name); else off.add(one.name); render(); });
        const swatch = make("b", { textContent: one.letter });
        swatch.style.color = one.colour;
        return make("label", {}, box, swatch, ` ${one.name}`);
      }), ...(hidden > 0 ? [make("span", { textContent: `${hidden} more methods; the filter chooses which are drawn.` })] : []));
      render();
    };
  }
  const pareto = (points, higher) => {
    const sign = higher ? -1 : 1;
    const kept = [];
    for (const p of [...points].sort((a, b) => a.x - b.x || sign * (a.y - b.y))) {
      if (!kept.length || sign * p.y < sign * kept.at(-1).y) kept.push(p);
    }
    return kept;
  };
  const interval = (low, high) => (low === null || high === null ? "" : ` (${round(low)} to ${round(high)})`);
  const drawn = []; // called again by the filters
  const grouped = (points, name) => {
    const series = new Map();
    for (const p of points) {
      if (!series.has(name(p))) series.set(name(p), { name: name(p), points: [] });
      series.get(name(p)).points.push(p);
    }
    return [...series.values()];
  };
  // Methods with the best value first, so that those near the front are drawn when there are too many.
  const bestFirst = (series, higher) => {
    const best = (one) => Math.min(...one.points.map((p) => (higher ? -p.y : p.y)));
    return series.sort((a, b) => best(a) - best(b));
  };
  const metricOptions = data.metrics.map((metric, i) => [i, metric.label]);
  const primary = Math.max(0, data.metrics.findIndex((metric) => metric.id === data.primary));

  function costChart(root) {
    const [blockLabel, block] = select("Rows", data.blocks.map((one, i) => [i, one.title]));
    const [yLabel, y] = select("Quality", metricOptions);
    const [xLabel, x] = select("Cost", data.axes);
    y.value = primary;
    const controls = make("div", { className: "controls" }, ...(data.blocks.length > 1 ? [blockLabel] : []), yLabel, xLabel);
    root.append(controls);
    const chart = new Chart(root, "Bars: 95 % intervals. Wide line: the Pareto front of what is drawn, by value. Dotted: the floor at this N.");
    const update = () => {
      const axis = data.columns.indexOf(x.value);
      const metric = data.metrics[y.value];
      const want = wanted();
      const label = data.axes.find(([key]) => key === x.value)[1];
      const points = [];
      for (const [b, m, nfe, spent, values] of data.points) {
        const found = values[y.value];
        const name = data.methods[m];
        if (b !== Number(block.value) || !found || spent[axis] === null || !hasWords(name.toLowerCase(), want.words)) continue;
        if (want.nfe && String(nfe) !== want.nfe) continue;
        const [value, low, high] = found;
        const text = `${name} at NFE ${nfe}: ${metric.id} ${round(value)}${interval(low, high)}, ${label} ${round(spent[axis])}`;
        points.push({ name, x: spent[axis], y: value, low, high, text });
      }
      chart.draw({
        title: `${metric.label} over ${label}, ${data.blocks[block.value].title}`, x: label, y: metric.label, higher: metric.higher,
        floor: data.blocks[block.value].floors[y.value], series: bestFirst(grouped(points, (p) => p.name), metric.higher),
      });
    };
    controls.addEventListener("change", update);
    drawn.push(update);
  }

  function tradeoffChart(root) {
    const budgets = [...new Set(data.points.map((p) => p[2]))].sort((a, b) => a - b);
    const sizes = [...new Set(data.blocks.map((one) => one.samples))];
    const [yLabel, y] = select("Distance", metricOptions);
    const [xLabel, x] = select("Against", metricOptions);
    const [nfeLabel, nfe] = select("NFE", budgets.map((n) => [n, n]));
    const [sizeLabel, size] = select("N", sizes.map((n) => [n, n]));
    const other = data.metrics.findIndex((metric) => /^(clip|align)/.test(metric.id));
    y.value = primary;
    x.value = other < 0 ? (primary + 1) % data.metrics.length : other;
    nfe.value = budgets.at(-1);
    const controls = make("div", { className: "controls" }, yLabel, xLabel, nfeLabel, ...(sizes.length > 1 ? [sizeLabel] : []));
    root.append(controls);
    const chart = new Chart(root, "A line joins the guidance scales of a method. Bars: 95 % intervals.");
    const update = () => {
      const [my, mx] = [data.metrics[y.value], data.metrics[x.value]];
      const points = [];
      for (const [b, m, n, , values] of data.points) {
        const [v, a] = [values[y.value], values[x.value]];
        const at = data.blocks[b];
        const name = data.methods[m];
        if (n !== Number(nfe.value) || at.samples !== Number(size.value) || !v || !a || !hasWords(name.toLowerCase(), wanted().words)) continue;
        const text = `${name} at guidance ${at.guidance}: ${my.id} ${round(v[0])}${interval(v[1], v[2])}, ${mx.id} ${round(a[0])}${interval(a[1], a[2])}`;
        points.push({ name, x: a[0], xlow: a[1], xhigh: a[2], y: v[0], low: v[1], high: v[2], text });
      }
      chart.draw({
        title: `${my.label} over ${mx.label} at NFE ${nfe.value}`, x: mx.label, y: my.label, higher: my.higher, linearX: true,
        floor: null, series: bestFirst(grouped(points, (p) => p.name), my.higher),
      });
    };
    controls.addEventListener("change", update);
    drawn.push(update);
  }

  for (const node of $(".needs-script")) node.hidden = false;
  for (const node of $("details.still")) { // the charts show the same
    const sync = () => { node.lastElementChild.hidden = !node.open; };
    node.addEventListener("toggle", sync);
    node.open = false;
    sync();
  }
  if (data.points.length) {
    costChart(document.getElementById("cost-chart"));
    const tradeoff = document.getElementById("tradeoff-chart");
    if (tradeoff) tradeoffChart(tradeoff);
  }
  const changed = () => { refilter(); for (const update of drawn) update(); };
  let waiting = 0;
  for (const kind of ["input", "change"]) {
    filters?.addEventListener(kind, () => { clearTimeout(waiting); waiting = setTimeout(changed, 120); });
  }
  filters?.addEventListener("submit", (event) => event.preventDefault());
  changed();
})();
