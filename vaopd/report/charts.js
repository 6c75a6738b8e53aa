// Draws the charts as SVG, with hover and zoom. A chart's data stand in its figure's data-chart; `charts.py` makes them.
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 46, right: 10, top: 8, bottom: 34 };
const LEAST_DRAG_PX = 6;
const zooms = new WeakMap(); // the figures' container -> the stretch of steps that is shown

/** Returns an SVG element; without a `tag`'s value, an attribute is left out. */
function shape(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Returns round numbers from `low` to `high`, about `count` of them. */
function listTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9); tick * step <= high + step * 1e-9; tick += 1) ticks.push(tick * step);
  return ticks;
}

const short = (value) => String(Number(value.toPrecision(4))).replace("-", "−");

/** Returns the lines of a chart of areas with each one lying on those before. */
function stack(series) {
  const height = series[0].y.map(() => 0);
  return series.map((each) => {
    const low = [...height];
    each.y.forEach((value, index) => { height[index] += value; });
    return { ...each, low, high: [...height], shown: each.y, y: [...height] };
  });
}

function drawChart(figure) {
  const chart = JSON.parse(figure.dataset.chart);
  const width = Math.max(240, figure.clientWidth);
  const height = chart.kind === "bars" ? 60 + 26 * chart.names.length : 220;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${chart.title}, ${chart.unit}` });
  const legend = element("p", { className: "legend" });
  for (const { name, colour, dash } of chart.series) {
    if (!name) continue;
    const line = shape("line", { x1: 0, x2: 20, y1: 5, y2: 5, stroke: colour, "stroke-width": 3, "stroke-dasharray": dash || undefined });
    legend.append(element("span", {}, shape("svg", { width: 20, height: 10, "aria-hidden": true }, line), ` ${name}`));
  }
  const tip = element("output", { className: "tip", hidden: true });
  figure.replaceChildren(figure.querySelector("figcaption"), svg, tip, legend);
  if (chart.kind === "bars") drawBars(svg, chart, width, height);
  else drawLines({ figure, svg, tip, chart, width, height });
}

function drawLines({ figure, svg, tip, chart, width, height }) {
  const series = chart.kind === "areas" ? stack(chart.series) : chart.series;
  const all = series.flatMap((each) => each.x);
  const whole = [Math.min(...all), Math.max(...all)];
  const [first, last] = zooms.get(figure.parentElement) ?? whole;
  const zoomed = first !== whole[0] || last !== whole[1];
  const seen = series.flatMap((each) =>
    each.x.flatMap((x, index) => {
      if (x < first || x > last) return [];
      const error = each.error?.[index] ?? 0;
      return [each.y[index] - error, each.y[index] + error, each.low?.[index], each.high?.[index]];
    }),
  ).filter((value) => value !== undefined);
  if (!seen.length) seen.push(...series.flatMap((each) => each.y)); // no point lies in this stretch
  let [low, high] = [Math.min(...seen), Math.max(...seen)];
  if (!zoomed) [low, high] = [chart.bottom ?? low, chart.top ?? high];
  const room = (high - low || Math.abs(high) || 1) * 0.05;
  if (zoomed || chart.bottom === null) low -= room;
  if (zoomed || chart.top === null) high += room;
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const across = (x) => ((x - first) / (last - first || 1)) * inner.width;
  const down = (y) => inner.height - ((y - low) / (high - low || 1)) * inner.height;

  const yTicks = listTicks(low, high, 5).filter((tick) => chart.unit !== "%" || (tick >= 0 && tick <= 100)); // error bars may go on
  drawAxes(svg, { xTicks: listTicks(first, last, inner.width / 70), yTicks, across, down, inner, unit: chart.unit });
  // A nested svg cuts off what lies outside.
  const plot = shape("svg", { x: MARGIN.left, y: MARGIN.top, ...inner, overflow: "hidden" });
  svg.append(plot);
  for (const each of series) drawSeries(plot, each, across, down, chart.kind === "areas");

  const named = series.filter((each) => each.name);
  const steps = [...new Set(named.flatMap((each) => each.x))].filter((x) => x >= first && x <= last).sort((a, b) => a - b);
  const cursor = shape("line", { y1: 0, y2: inner.height, stroke: "currentColor", "stroke-opacity": 0.5, visibility: "hidden" });
  plot.append(cursor);
  let at = null;
  const show = (index) => {
    if (!steps.length) return;
    at = Math.max(0, Math.min(steps.length - 1, index));
    const x = across(steps[at]);
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x);
    cursor.setAttribute("visibility", "visible");
    const lines = named.flatMap((each) => {
      const place = each.x.indexOf(steps[at]);
      if (place < 0) return [];
      const error = each.error ? ` ± ${short(each.error[place])}` : each.low && !each.shown ? ` (${short(each.low[place])} to ${short(each.high[place])})` : "";
      return [element("span", {}, `${each.name}: ${short((each.shown ?? each.y)[place])}${error}`)];
    });
    tip.replaceChildren(element("b", {}, `step ${short(steps[at])}`), ...lines);
    tip.hidden = false;
    tip.style.left = `${Math.min(x + MARGIN.left + 10, width - tip.offsetWidth)}px`;
  };
  const hide = () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  };
  const stepAt = (event) => first + ((event.clientX - plot.getBoundingClientRect().left) / inner.width) * (last - first);
  const nearest = (x) => steps.reduce((best, step, index) => (Math.abs(step - x) < Math.abs(steps[best] - x) ? index : best), 0);
  zoomByDrag({ figure, svg, plot, inner, stepAt, across, whole });
  svg.addEventListener("pointermove", (event) => show(nearest(stepAt(event))));
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("keydown", (event) => {
    const next = { ArrowRight: (at ?? -1) + 1, ArrowLeft: (at ?? 1) - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") zoom(figure, null);
    else if (next === undefined) return;
    else show(next);
    event.preventDefault();
  });
}

function drawAxes(svg, { xTicks, yTicks, across, down, inner, unit }) {
  const line = (x1, y1, x2, y2, opacity) => svg.append(shape("line", { x1, y1, x2, y2, stroke: "currentColor", "stroke-opacity": opacity }));
  const text = (x, y, words, anchor) => svg.append(shape("text", { x, y, "text-anchor": anchor, fill: "currentColor", "font-size": 11 }, words));
  const [left, bottom] = [MARGIN.left, MARGIN.top + inner.height];
  for (const tick of yTicks) {
    line(left, MARGIN.top + down(tick), left + inner.width, MARGIN.top + down(tick), 0.15);
    text(left - 5, MARGIN.top + down(tick) + 4, short(tick), "end");
  }
  for (const tick of xTicks.filter(Number.isInteger)) text(left + across(tick), bottom + 14, short(tick), "middle");
  line(left, bottom, left + inner.width, bottom, 0.6);
  text(left, bottom + 29, unit, "start");
  text(left + inner.width, bottom + 29, "optimizer step", "end");
}

function drawSeries(plot, each, across, down, filled) {
  const points = each.x.map((x, index) => `${across(x).toFixed(1)},${down(each.y[index]).toFixed(1)}`);
  if (each.low) {
    const edge = (values) => each.x.map((x, index) => `${across(x).toFixed(1)},${down(values[index]).toFixed(1)}`);
    const area = [...edge(each.high), ...edge(each.low).reverse()].join(" ");
    plot.append(shape("polygon", { points: area, fill: each.colour, "fill-opacity": filled ? 0.85 : 0.2 }));
  }
  if (filled) return;
  plot.append(shape("polyline", { points: points.join(" "), fill: "none", stroke: each.colour, "stroke-width": each.faint ? 1 : 2, "stroke-opacity": each.faint ? 0.35 : 1, "stroke-dasharray": each.dash || undefined }));
  each.x.forEach((x, index) => {
    if (each.error) {
      const [from, to] = [-1, 1].map((sign) => down(each.y[index] + sign * each.error[index]));
      plot.append(shape("line", { x1: across(x), x2: across(x), y1: from, y2: to, stroke: each.colour }));
    }
    if (each.dots || each.x.length === 1) plot.append(shape("circle", { cx: across(x), cy: down(each.y[index]), r: 2.5, fill: each.colour }));
  });
}

/** Zooms all figures beside this one into a stretch of steps; null: shows everything. */
function zoom(figure, stretch) {
  const focused = document.activeElement?.matches(".chart :focus-visible") && document.activeElement.closest(".chart");
  if (stretch) zooms.set(figure.parentElement, stretch);
  else zooms.delete(figure.parentElement);
  figure.parentElement.querySelectorAll(".chart").forEach(drawChart);
  if (focused) focused.querySelector("svg").focus();
}

function zoomByDrag({ figure, svg, plot, inner, stepAt, across, whole }) {
  const mark = shape("rect", { y: 0, height: inner.height, fill: "currentColor", "fill-opacity": 0.12, visibility: "hidden" });
  plot.append(mark);
  let from = null;
  svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse" && event.button === 0) from = { px: event.clientX, step: stepAt(event) };
  });
  svg.addEventListener("pointermove", (event) => {
    if (!from || Math.abs(event.clientX - from.px) < LEAST_DRAG_PX) return;
    const [left, right] = [across(from.step), across(stepAt(event))].sort((a, b) => a - b);
    mark.setAttribute("x", left);
    mark.setAttribute("width", right - left);
    mark.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerup", (event) => {
    const dragged = from && Math.abs(event.clientX - from.px) >= LEAST_DRAG_PX;
    const stretch = dragged && [from.step, stepAt(event)].sort((a, b) => a - b);
    from = null;
    if (stretch) zoom(figure, [Math.max(stretch[0], whole[0]), Math.min(stretch[1], whole[1])]);
  });
  svg.addEventListener("pointerleave", () => {
    from = null;
    mark.setAttribute("visibility", "hidden");
  });
  svg.addEventListener("dblclick", () => zoom(figure, null));
}

function drawBars(svg, chart, width, height) {
  const longest = Math.max(...chart.names.map((_, row) => chart.series.reduce((sum, each) => sum + each.y[row], 0)));
  const left = Math.min(width / 3, 12 + 6.5 * Math.max(...chart.names.map((name) => name.length)));
  const across = (value) => (value / (longest || 1)) * (width - left - MARGIN.right);
  const fit = Math.floor((left - 12) / 6.5);
  const shown = (name) => (name.length > fit ? `…${name.slice(1 - fit)}` : name); // names of a series differ at their end
  chart.names.forEach((name, row) => {
    const y = 8 + 26 * row;
    svg.append(shape("text", { x: left - 6, y: y + 13, "text-anchor": "end", fill: "currentColor", "font-size": 11 }, shown(name)));
    let before = 0;
    for (const each of chart.series) {
      const title = shape("title", {}, `${name}, ${each.name}: ${short(each.y[row])} s`);
      svg.append(shape("rect", { x: left + across(before), y, width: across(each.y[row]), height: 18, fill: each.colour }, title));
      before += each.y[row];
    }
  });
  for (const tick of listTicks(0, longest, 4))
    svg.append(shape("text", { x: left + across(tick), y: height - 18, "text-anchor": "middle", fill: "currentColor", "font-size": 11 }, short(tick)));
  svg.append(shape("text", { x: width - MARGIN.right, y: height - 3, "text-anchor": "end", fill: "currentColor", "font-size": 11 }, chart.unit));
}

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.clientWidth && target.dataset.width !== String(target.clientWidth)) {
    target.dataset.width = target.clientWidth;
    drawChart(target);
  }
});

function drawCharts() {
  document.querySelectorAll(".chart").forEach((figure) => resized.observe(figure));
}
