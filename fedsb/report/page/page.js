"use strict";
(() => {
  const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"];
  const GLYPHS = ["●", "■", "▲", "◆", "▼", "✚", "✖"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const LINES = ["solid", "dashed", "dotted", "dashed"];
  const BAR_FILLS = ["", "/", "x"];
  const parts = JSON.parse(document.getElementById("data").textContent);
  const drawn = [];
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };

  /* Values as the report writes them. */
  const plain = (v) => (v === null ? "–" : v === 0 || (Math.abs(v) >= 1e-3 && Math.abs(v) < 1000) ? v.toFixed(3) : String(Number(v.toPrecision(4))));
  const bytes = (v) => {
    const units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let power = 0;
    while (power < units.length - 1 && Number((Math.abs(v) / 1000 ** power).toFixed(power ? 1 : 0)) >= 1000) power += 1;
    return `${(v / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
  };
  const seconds = (v) => {
    const whole = Math.round(v);
    if (v < 9.95) return `${v.toFixed(1)} s`;
    if (whole < 60) return `${whole} s`;
    return whole < 3600 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  };
  const WRITE = { number: plain, bytes, seconds, round: String };
  const written = (axis, v) => (v === null || v === undefined ? "–" : WRITE[axis.unit](v));
  const ranges = (numbers) => `${numbers.length > 1 ? "runs" : "run"} ${numbers.join(", ")}`;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isDark = () => getComputedStyle(document.body).backgroundColor === "rgb(20, 23, 26)";
  const colour = (group) => (group.colour === "#000000" ? css("--ink") : group.colour);
  /* Plotly takes what it draws for HTML of a kind: a name with signs of it is to stay a name. */
  const literal = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const wrapped = (text, width, most = Infinity) => {
    const lines = [""];
    for (const word of text.split(" ").flatMap((each) => each.match(new RegExp(`.{1,${width}}`, "gsu")) || [])) {
      const last = lines[lines.length - 1];
      if (last && last.length + word.length >= width) lines.push(word);
      else lines[lines.length - 1] = last ? `${last} ${word}` : word;
    }
    const shown = lines.length > most ? [...lines.slice(0, most - 1), `…${lines[lines.length - 1]}`] : lines;
    return shown.map(literal).join("<br>");
  };

  /* An axis in bytes: powers of ten, or a few even steps, each with its unit. */
  const ticks = (axis, values) => {
    if (axis.unit !== "bytes" && axis.unit !== "seconds") return {};
    const shown = values.filter((v) => v > 0);
    if (!shown.length) return {};
    const low = Math.min(...shown), high = Math.max(...shown), found = [];
    if (axis.log) {
      const steps = high / low > 300 ? [1] : [1, 2, 5];
      for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p += 1) for (const s of steps) found.push(s * 10 ** p);
    } else {
      const rough = high / 4, power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= rough);
      for (let v = 0; v <= high + step; v += step) found.push(v);
    }
    return { tickvals: found, ticktext: found.map((v) => WRITE[axis.unit](v).replace(".0 ", " ")) };
  };
  const axisOf = (axis, values, more = {}) => ({
    title: { text: literal(axis.title), standoff: 8 }, type: axis.log ? "log" : "linear", automargin: true, zeroline: false, fixedrange: true,
    gridcolor: css("--grid"), linecolor: css("--muted"), tickcolor: css("--muted"),
    ...(axis.log && axis.unit === "number" ? { exponentformat: "power", dtick: 1 } : {}),
    ...(axis.unit === "round" ? { tickformat: "d", dtick: values.length && Math.max(...values) > 8 ? undefined : 1 } : {}),
    ...ticks(axis, values), ...more,
  });
  const names = (rows, groups, narrow) => ({
    type: "linear", automargin: true, zeroline: false, fixedrange: true, showgrid: false, range: [rows.length - 0.4, -0.6],
    tickvals: rows.map((_, i) => i), ticktext: rows.map((row) => wrapped(groups[row.g].label, narrow ? 18 : 30, 3)), linecolor: css("--muted"),
  });

  /* Each kind of chart: its traces, layout, height, and for each trace what is said of its points. */
  const KINDS = {
    lines(spec, variant, rows, groups) {
      const x = variant.x || spec.x, y = variant.y || spec.y;
      const said = rows.map((row) => row.x.map((value, i) => {
        const round = row.r && x.unit !== "round" ? `round ${row.r[i]}, ` : "";
        const error = row.e && row.e[i] !== null ? ` ± ${plain(row.e[i])}` : "";
        const value_y = y.log ? row.y[i].toExponential(1) : written(y, row.y[i]);
        return `${groups[row.g].label}: ${round}${x.unit === "round" ? "round " : ""}${written(x, value)}${x.title === "epsilon" ? " epsilon" : ""}: ${y.log ? "gap" : y.title} ${value_y}${error} (${ranges(groups[row.g].runs)})`;
      }));
      const traces = rows.map((row, i) => ({
        x: row.x, y: row.y, mode: row.x.length > 60 ? "lines" : "lines+markers", text: said[i], hoverinfo: "none",
        line: { color: colour(groups[row.g]), dash: DASHES[groups[row.g].dash], width: 2 },
        marker: { color: colour(groups[row.g]), symbol: SYMBOLS[groups[row.g].marker], size: 8 },
        ...(row.e ? { error_y: { type: "data", array: row.e.map((e) => e || 0), thickness: 1, width: 3, color: colour(groups[row.g]) } } : {}),
      }));
      const level = spec.level && [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: spec.level.value, y1: spec.level.value, line: { color: css("--muted"), width: 1, dash: "dash" } }];
      const note = spec.level && [{ xref: "paper", x: 1, y: Math.log10(spec.level.value), text: spec.level.text, showarrow: false, xanchor: "right", yanchor: "bottom", font: { color: css("--muted"), size: 11 } }];
      const of = new Map(rows.map((row) => [row.g, row]));
      const links = (spec.links || []).map((link) => ({ name: link.name, ends: link.of.filter((g) => of.has(g)).map((g) => of.get(g)) })).filter((link) => link.ends.length > 1);
      const called = links.map(({ name, ends: [...ends] }) => {
        const { x: [at], y: [high] } = ends.pop();
        return { x: x.log ? Math.log10(at) : at, y: high, text: wrapped(name, 40), showarrow: false, xanchor: "right", yanchor: "bottom", xshift: -8, font: { color: css("--ink"), size: 11 } };
      });
      const joined = links.flatMap(({ ends }) => {
        return ends.slice(1).map((end, i) => ({ type: "line", layer: "below", x0: ends[i].x[0], y0: ends[i].y[0], x1: end.x[0], y1: end.y[0], line: { color: css("--muted"), width: 1.5 } }));
      });
      const layout = { xaxis: axisOf(x, rows.flatMap((row) => row.x)), yaxis: axisOf(y, rows.flatMap((row) => row.y)), shapes: [...joined, ...(level || [])], annotations: [...called, ...(note || [])] };
      return { traces, layout, height: 340, said };
    },
    ranges(spec, variant, rows, groups, narrow) {
      const said = rows.map((row) => [`${groups[row.g].label}: ${row.v >= 0 ? "+" : ""}${plain(row.v)} [${row.i.map(plain).join(", ")}] (${ranges(groups[row.g].runs)})`]);
      const traces = rows.map((row, i) => ({
        x: [row.v], y: [i], mode: "markers", text: said[i], hoverinfo: "none",
        marker: { color: colour(groups[row.g]), symbol: SYMBOLS[groups[row.g].marker] + (row.clear ? "" : "-open"), size: 10, line: { width: 2, color: colour(groups[row.g]) } },
        error_x: { type: "data", symmetric: false, array: [row.i[1] - row.v], arrayminus: [row.v - row.i[0]], color: colour(groups[row.g]), thickness: 2, width: 4 },
      }));
      const zero = [{ type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: css("--ink"), width: 1 } }];
      return { traces, layout: { xaxis: axisOf(spec.x, []), yaxis: names(rows, groups, narrow), shapes: zero }, height: 90 + (narrow ? 40 : 30) * rows.length, said };
    },
    dots(spec, variant, rows, groups, narrow) {
      const said = rows.map((row) => [...row.names.map((name, i) => `${groups[row.g].label}: ${name}: ${plain(row.x[i])}`), `${groups[row.g].label}: mean of the clients ${plain(row.mean)}`]);
      const traces = rows.map((row, i) => ({
        x: [...row.x, row.mean], y: [...row.x, row.mean].map(() => i), mode: "markers", text: said[i], hoverinfo: "none",
        marker: { color: colour(groups[row.g]), opacity: [...row.x.map(() => 0.55), 1], symbol: [...row.x.map(() => "circle"), "line-ns-open"], size: [...row.x.map(() => 8), 22], line: { width: [...row.x.map(() => 0), 3], color: colour(groups[row.g]) } },
      }));
      return { traces, layout: { xaxis: axisOf(spec.x, []), yaxis: names(rows, groups, narrow) }, height: 90 + (narrow ? 40 : 30) * rows.length, said };
    },
    bars(spec, variant, rows, groups, narrow) {
      const shades = [css("--shade"), "#d58a00", css("--muted")];
      const said = variant.names.map((name, k) => rows.map((row) => `${groups[row.g].label}: ${name} ${written(variant.x, row.values[k])} (${ranges(groups[row.g].runs)})`));
      const traces = variant.names.map((name, k) => ({
        type: "bar", orientation: "h", name, y: rows.map((_, i) => i), x: rows.map((row) => row.values[k] || null), text: said[k], textposition: "none", hoverinfo: "none",
        marker: { color: shades[k], pattern: { shape: BAR_FILLS[k], bgcolor: shades[k], fgcolor: css("--card"), fgopacity: 0.7, size: 6 } },
      }));
      const shown = rows.flatMap((row) => row.values);
      const legend = { orientation: "h", y: 1, yanchor: "bottom", x: 0, itemclick: false, itemdoubleclick: false };
      const low = variant.x.log ? { range: [Math.log10(Math.min(...shown.filter((v) => v > 0))) - 0.4, Math.log10(Math.max(...shown)) + 0.2] } : { rangemode: "tozero" };
      return { traces, layout: { xaxis: axisOf(variant.x, shown, low), yaxis: names(rows, groups, narrow), legend, showlegend: true, bargap: 0.25 }, height: 130 + 16 * variant.names.length * rows.length, said };
    },
  };

  class Chart {
    constructor(spec, part, place) {
      Object.assign(this, { spec, part, groups: part.groups, variant: spec.variants[0], at: [0, 0] });
      const id = `c${place}-${spec.key}`;
      this.said = make("p", { class: "said", id: `${id}-said`, "aria-live": "polite" });
      this.plot = make("div", { class: "plot", tabindex: 0, role: "application", "aria-roledescription": "chart", "aria-labelledby": id, "aria-describedby": `${id}-caption`, onkeydown: (event) => this.key(event) });
      const table = make("div", { class: "figures" });
      this.details = make("details", { ontoggle: () => this.tabulate(table) }, make("summary", {}, "The same as a table"), table);
      const choices = spec.variants.filter((each) => each.label).map((each) => make("button", { type: "button", "aria-pressed": each === this.variant, onclick: (event) => this.choose(each, event.currentTarget) }, each.label));
      this.choices = make("div", { class: "variants", role: "group", "aria-label": "What is shown" }, ...(choices.length > 1 ? choices : []));
      this.figure = make("figure", { id: `${id}-figure` }, make("h4", { id }, spec.title), ...(choices.length > 1 ? [this.choices] : []), this.plot, this.said, make("figcaption", { id: `${id}-caption` }, spec.caption), this.details);
    }
    get rows() { return this.variant.rows.filter((row) => !this.part.hidden.has(row.g)); }
    choose(variant, button) {
      this.variant = variant;
      for (const each of this.choices.children) each.setAttribute("aria-pressed", each === button);
      this.draw();
    }
    draw() {
      const width = this.plot.clientWidth || 500;
      this.made = KINDS[this.spec.kind](this.spec, this.variant, this.rows, this.groups, width < 440);
      this.plot.style.height = `${this.made.height}px`;
      const layout = {
        width, height: this.made.height, showlegend: false, dragmode: false, hovermode: "closest", hoverdistance: 30, margin: { l: 12, r: 14, t: 12, b: 12 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 }, ...this.made.layout,
      };
      const first = !this.plot.data;
      Plotly.react(this.plot, this.made.traces, layout, { displayModeBar: false, responsive: false, scrollZoom: false, doubleClick: false });
      if (first) {
        this.plot.on("plotly_hover", ({ points }) => this.point(points[0].curveNumber, points[0].pointNumber));
        this.plot.on("plotly_click", ({ points }) => this.point(points[0].curveNumber, points[0].pointNumber));
      }
      this.at = [0, -1];
      this.say("");
      if (this.details.open) this.tabulate(this.details.lastElementChild);
    }
    say(text) {
      this.said.textContent = text || "Values: point at them, tap, or press arrow keys.";
      this.said.classList.toggle("hint", !text);
    }
    point(curve, point) {
      const text = this.made.said[curve] && this.made.said[curve][point];
      if (!text) return;
      this.at = [curve, point];
      this.say(text);
      this.mark(curve, point, text);
    }
    mark(curve, point, text) {
      const trace = this.made.traces[curve], full = this.plot._fullLayout;
      const place = (axis, v) => (axis.type === "log" ? Math.log10(v) : v);
      const note = {
        x: place(full.xaxis, trace.x[point]), y: place(full.yaxis, trace.y[point]), text: wrapped(text, 36), showarrow: true, arrowhead: 0, ax: 0, ay: -34, align: "left",
        bgcolor: css("--paper"), bordercolor: css("--ink"), borderpad: 4, font: { color: css("--ink"), size: 12 },
      };
      if (trace.x[point] === null) return;
      const share = (full.xaxis.d2p(trace.x[point]) || 0) / (full.xaxis._length || 1), high = (full.yaxis.d2p(trace.y[point]) || 0) < 90;
      Object.assign(note, { xanchor: share > 0.6 ? "right" : share < 0.4 ? "left" : "center", ay: high ? 44 : -34 });
      clearTimeout(this.later);
      this.later = setTimeout(() => Plotly.relayout(this.plot, { annotations: [...(this.made.layout.annotations || []), note] }), 0);
    }
    key(event) {
      const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
      if (event.key === "Escape") {
        Plotly.relayout(this.plot, { annotations: this.made.layout.annotations || [] });
        this.say("");
        return;
      }
      if (!moves[event.key] || !this.made.said.length) return;
      event.preventDefault();
      const [down, right] = moves[event.key], many = this.made.said.length;
      const curve = (this.at[0] + down + many) % many, count = this.made.said[curve].length;
      const point = this.at[1] < 0 && !right ? 0 : (Math.min(Math.max(this.at[1], right > 0 ? -1 : 0), count - 1) + right + count) % count;
      this.point(curve, point);
    }
    tabulate(place) {
      if (!this.details.open) return;
      const rows = this.made.said.flat().map((text) => text.split(/: (.*)/s)).map(([name, rest]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, rest || "")));
      place.tabIndex = 0;
      place.setAttribute("role", "region");
      place.setAttribute("aria-label", `${this.spec.title}: figures`);
      const head = make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "method"), make("th", { scope: "col" }, "figure")));
      place.replaceChildren(make("table", {}, head, make("tbody", {}, ...rows)));
    }
  }

  /* One legend for all charts of a part. */
  const legend = (place, part, redraw) => {
    const buttons = part.groups.map((group, g) => {
      const key = make("span", { class: "key", "aria-hidden": "true" }, make("i", { style: `border-top-style:${LINES[group.dash]}` }), make("b", {}, GLYPHS[group.marker]));
      const button = make("button", { type: "button", "aria-pressed": "true", title: ranges(group.runs), onclick: () => {
        if (part.hidden.has(g)) part.hidden.delete(g); else part.hidden.add(g);
        show();
      } }, key, group.label);
      return button;
    });
    const paint = () => buttons.forEach((button, g) => { button.firstChild.style.color = colour(part.groups[g]); });
    const show = () => {
      buttons.forEach((button, g) => button.setAttribute("aria-pressed", !part.hidden.has(g)));
      redraw();
    };
    const all = make("button", { type: "button", onclick: () => { part.hidden.clear(); show(); } }, "all");
    const none = make("button", { type: "button", onclick: () => { part.groups.forEach((_, g) => part.hidden.add(g)); show(); } }, "none");
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", "Methods that the charts show");
    place.append(...buttons, ...(buttons.length > 2 ? [all, none] : []));
    paint();
    part.paint = paint;
  };

  const sortable = (table) => {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending", numeric = head.dataset.sort === "number";
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.key, sign = up ? 1 : -1;
        const ordered = [...body.rows].sort((a, b) => {
          if (!numeric) return sign * key(a).localeCompare(key(b), undefined, { numeric: true });
          if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
          return sign * (Number(key(a)) - Number(key(b)));
        });
        body.append(...ordered);
      });
    });
  };

  /* Whoever waits for the page can read, sort and press before the last chart is drawn. */
  const soon = (tasks, done) => {
    const next = () => {
      const task = tasks.shift();
      if (!task) { if (done) done(); return; }
      task();
      setTimeout(next, 0);
    };
    next();
  };
  const redraw = (charts) => soon(charts.map((chart) => () => chart.draw()));

  document.querySelectorAll("table.sortable").forEach(sortable);
  parts.forEach((part, place) => {
    part.hidden = new Set();
    const charts = part.charts.map((spec) => new Chart(spec, part, place));
    document.querySelector(`.charts[data-part="${place}"]`).append(...charts.map((chart) => chart.figure));
    legend(document.querySelector(`.legend[data-part="${place}"]`), part, () => redraw(charts));
    drawn.push(...charts);
  });
  const retheme = () => { parts.forEach((part) => part.paint()); redraw(drawn); };
  const theme = document.getElementById("theme"), THEMES = { "": "as the system", light: "light", dark: "dark" };
  theme.addEventListener("click", () => {
    const known = Object.keys(THEMES), next = known[(known.indexOf(document.documentElement.dataset.theme || "") + 1) % known.length];
    if (next) document.documentElement.dataset.theme = next; else delete document.documentElement.dataset.theme;
    theme.textContent = `Colours: ${THEMES[next]}`;
    retheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retheme);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(drawn); } });
  performance.mark("interactive");
  soon(drawn.map((chart) => () => chart.draw()), () => performance.mark("drawn"));
})();
