/* Dashboards: what the selectors choose is drawn as SVG and left in the table below. */
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const KINDS = {
    ours: ["this library", "circle"],
    written: ["as a user would write it", "square"],
    expert: ["as an expert would", "diamond"],
    other: ["beside: not the same result", "cross"],
    product: ["matrix products of the same shapes", "bar"],
  };
  const MARKS = ["circle", "square", "diamond", "triangle", "cross"];
  const LIBRARIES = { numpy: "NumPy", torch: "PyTorch", jax: "JAX", cupy: "CuPy" };

  const unique = (items) => [...new Set(items)];
  const say = (value) => (value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));

  function element(name, attributes = {}, text = "") {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    return node;
  }

  function mark(shape, x, y, style, title) {
    const r = 6;
    const paths = {
      circle: `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
      square: `M${x - r + 1} ${y - r + 1}h${2 * r - 2}v${2 * r - 2}h${-2 * r + 2}Z`,
      diamond: `M${x} ${y - r - 1}L${x + r + 1} ${y}L${x} ${y + r + 1}L${x - r - 1} ${y}Z`,
      triangle: `M${x} ${y - r - 1}L${x + r} ${y + r - 1}L${x - r} ${y + r - 1}Z`,
      cross: `M${x - r + 1} ${y - r + 1}l${2 * r - 2} ${2 * r - 2}m0 ${-2 * r + 2}l${-2 * r + 2} ${2 * r - 2}`,
      bar: `M${x} ${y - r - 3}v${2 * r + 6}`,
    };
    const node = element("path", { d: paths[shape], class: `mark ${style}` });
    node.append(element("title", {}, title));
    return node;
  }

  /* Powers of ten and what lies between them, where a logarithmic axis is short. */
  function ticks(low, high) {
    const found = [];
    const steps = Math.log10(high / low) > 2.5 ? [1] : Math.log10(high / low) > 1 ? [1, 3] : [1, 2, 3, 5, 7];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1)
      for (const m of steps) {
        const value = m * 10 ** e;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    return found;
  }

  function legend(entries) {
    const list = document.createElement("ul");
    list.className = "dashboard-legend";
    for (const [shape, style, text] of entries) {
      const item = document.createElement("li");
      const sample = element("svg", { viewBox: "0 0 20 20", width: 20, height: 20, "aria-hidden": "true" });
      sample.append(mark(shape, 10, 10, style, ""));
      item.append(sample, text);
      list.append(item);
    }
    return list;
  }

  /* A row for each problem, a mark for each contestant, time to the right. */
  function drawPeers(races, relative) {
    const rows = races
      .map((race) => {
        const product = race.times.find((row) => row.kind === "product");
        const unit = relative ? product && product.ms : 1;
        return unit ? { race, times: race.times.map((row) => ({ ...row, at: row.ms / unit })) } : null;
      })
      .filter(Boolean);
    if (!rows.length) return null;
    const all = rows.flatMap((row) => row.times.map((time) => time.at));
    const low = Math.min(...all) / 1.25;
    const high = Math.max(...all) * 1.25;
    const width = 860, left = 250, right = 120, line = 34, top = 10;
    const height = top + line * rows.length + 46;
    const x = (value) => left + ((width - left - right) * Math.log(value / low)) / Math.log(high / low);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "chart" });
    const bottom = top + line * rows.length;
    for (const value of ticks(low, high)) {
      svg.append(element("path", { d: `M${x(value)} ${top}V${bottom}`, class: "rule" }));
      svg.append(element("text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, say(value)));
    }
    const axis = relative ? "times as long as matrix products of the same shapes" : "milliseconds for one call";
    svg.append(element("text", { x: (left + width - right) / 2, y: bottom + 38, "text-anchor": "middle" }, axis));
    rows.forEach(({ race, times }, k) => {
      const y = top + line * (k + 0.5);
      svg.append(element("text", { x: left - 12, y: y + 4, "text-anchor": "end" }, race.problem));
      const values = times.map((time) => time.at);
      svg.append(element("path", { d: `M${x(Math.min(...values))} ${y}H${x(Math.max(...values))}`, class: "span" }));
      const sorted = [...times].sort((a, b) => (a.kind === "ours") - (b.kind === "ours"));
      for (const time of sorted)
        svg.append(
          mark(KINDS[time.kind][1], x(time.at), y, time.kind,
            `${time.label}: ${say(time.ms)} ms${time.agrees ? "" : ", another result"}`),
        );
      const ours = times.find((time) => time.kind === "ours");
      const best = (kind) => {
        const found = times.filter((time) => time.kind === kind && time.agrees);
        return found.length ? Math.min(...found.map((time) => time.at)) : null;
      };
      const base = relative ? best("product") : best("written");
      if (ours && base) {
        const factor = relative ? ours.at : base / ours.at;
        svg.append(element("text", { x: width - right + 12, y: y + 4, class: "factor" },
          relative ? `${say(factor)} ×` : `${say(factor)} × as fast`));
      }
    });
    const present = unique(rows.flatMap((row) => row.times.map((time) => time.kind)));
    const entries = Object.entries(KINDS).filter(([kind]) => present.includes(kind));
    const text = rows.map(({ race, times }) =>
      `${race.problem}: ${times.map((time) => `${time.label} ${say(time.ms)} ms`).join(", ")}`);
    svg.setAttribute("aria-label", `${axis}. ${text.join("; ")}`);
    return [svg, legend(entries.map(([kind, [title, shape]]) => [shape, kind, title]))];
  }

  /* Commits to the right, a line for each machine and library. */
  function drawHistory(series, commits) {
    const all = series.flatMap((row) => row.values.filter((value) => value !== null && value > 0));
    if (!all.length) return null;
    const low = Math.min(...all) / 1.4;
    const high = Math.max(...all) * 1.4;
    const width = 860, height = 380, left = 80, right = 30, top = 12, bottom = height - 70;
    const x = (k) => left + ((width - left - right) * (k + 0.5)) / commits.length;
    const y = (value) => bottom - ((bottom - top) * Math.log(value / low)) / Math.log(high / low);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "chart" });
    for (const value of ticks(low, high)) {
      svg.append(element("path", { d: `M${left} ${y(value)}H${width - right}`, class: "rule" }));
      svg.append(element("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, say(value)));
    }
    svg.append(element("text", { x: 14, y: top + 4 }, series[0].unit));
    const every = Math.ceil(commits.length / 8);
    commits.forEach(([name, date], k) => {
      if (k % every) return;
      svg.append(element("text", { x: x(k), y: bottom + 20, "text-anchor": "middle" }, name));
      svg.append(element("text", { x: x(k), y: bottom + 38, "text-anchor": "middle" }, date));
    });
    const entries = [];
    series.forEach((row, k) => {
      const style = `series-${k % 5}`;
      const points = row.values.map((value, at) => [at, value]).filter(([, value]) => value !== null && value > 0);
      const path = points.map(([at, value], n) => `${n ? "L" : "M"}${x(at)} ${y(value)}`).join("");
      svg.append(element("path", { d: path, class: `line ${style}` }));
      const name = `${LIBRARIES[row.library] || ""} on ${row.machine}`.trim();
      for (const [at, value] of points)
        svg.append(mark(MARKS[k % 5], x(at), y(value), style, `${name}, ${commits[at][0]}: ${say(value)} ${row.unit}`));
      entries.push([MARKS[k % 5], style, name]);
    });
    svg.setAttribute("aria-label", series.map((row, k) =>
      `${entries[k][2]}: ${row.values.map((value, at) => (value === null ? "" : `${commits[at][0]} ${say(value)} ${row.unit}`))
        .filter(Boolean).join(", ")}`).join("; "));
    return [svg, legend(entries)];
  }

  /* Selectors in a row; `choices` gives the options of each under what the ones before it say. */
  function controls(place, fields, choices, redraw) {
    const form = document.createElement("form");
    form.className = "dashboard-controls";
    const chosen = {};
    const selects = fields.map(([key, title, name = (value) => value]) => {
      const label = document.createElement("label");
      const select = document.createElement("select");
      select.name = key;
      label.append(title, select);
      form.append(label);
      select.addEventListener("change", () => {
        chosen[key] = select.value;
        update();
      });
      return [key, select, name];
    });
    function update() {
      for (const [key, select, name] of selects) {
        const options = choices(key, chosen);
        if (!options.includes(chosen[key])) chosen[key] = options[0];
        select.replaceChildren(...options.map((value) => new Option(name(value), value, false, value === chosen[key])));
      }
      redraw(chosen);
    }
    form.addEventListener("submit", (event) => event.preventDefault());
    place.append(form);
    return update;
  }

  function filter(table, chosen, keys) {
    for (const cell of table.querySelectorAll(".key")) cell.hidden = true;
    for (const row of table.tBodies[0].rows)
      row.hidden = keys.some((key) => row.dataset[key] !== chosen[key]);
  }

  function show(place, drawn) {
    place.replaceChildren(...(drawn || [document.createTextNode("Nothing was measured for this choice.")]));
  }

  function start(kind, fields, pick, draw, keys) {
    const place = document.getElementById(`dashboard-${kind}`);
    if (!place) return;
    const data = JSON.parse(document.getElementById(`data-${kind}`).textContent);
    const rows = data.races || data.series;
    const figure = document.createElement("div");
    figure.className = "dashboard-figure";
    figure.tabIndex = 0; // a phone scrolls it
    figure.setAttribute("role", "region");
    figure.setAttribute("aria-label", "Chart");
    const choices = (key, chosen) => {
      const before = keys.slice(0, keys.indexOf(key));
      if (!keys.includes(key)) return pick[key];
      return unique(rows.filter((row) => before.every((other) => row[other] === chosen[other])).map((row) => row[key]));
    };
    const update = controls(place, fields, choices, (chosen) => {
      const found = rows.filter((row) => keys.every((key) => row[key] === chosen[key]));
      show(figure, draw(found, chosen, data));
      filter(document.getElementById(`table-${kind}`), chosen, keys);
    });
    place.append(figure);
    place.hidden = false;
    update();
  }

  start(
    "peers",
    [["machine", "Machine"], ["library", "Library", (value) => LIBRARIES[value]], ["operation", "Operation"],
      ["dtype", "Precision"], ["scale", "Scale"]],
    { scale: ["milliseconds", "against matrix products"] },
    (found, chosen) => drawPeers(found, chosen.scale !== "milliseconds"),
    ["machine", "library", "operation", "dtype"],
  );
  start(
    "history",
    [["benchmark", "Benchmark"], ["case", "Problem"]],
    {},
    (found, chosen, data) => drawHistory(found, data.commits),
    ["benchmark", "case"],
  );
})();
