// The panel beside the responses: a token's numbers and its map of regions, or where the rollout weights come from.
import { amount, sum } from "./cells.js";
import { $, h, nats, percent, visible } from "./dom.js";

const DEVIATION_EPS = 1e-6; // vaopd.scoring.weights.rollout_weights

let shown = null;
let scale = 1;
let pinned = null; // shows what stays after hovering over others
let maps = new Map(); // reply -> response -> the replies of /v1/regions, one for each picture
let searching = null; // { reply, k } of the regions that are being searched
let findRegions = null;

/** `find(reply, k)` asks for the regions of a response: returns a promise of one reply for each picture. */
export function listen(find) {
  findRegions = find;
}

export function begin(newShown, newScale) {
  [shown, scale, maps, searching] = [newShown, newScale, new Map(), null];
  $("#details").hidden = false;
  clear();
}

/** Calls `show` while the pointer is over an element, and after it was focused, until another one is. */
export function follow(element, show) {
  const byMouse = (act) => (event) => event.pointerType === "mouse" && act();
  element.addEventListener("pointerenter", byMouse(show));
  element.addEventListener("pointerleave", byMouse(() => (pinned ? pinned() : clear())));
  element.addEventListener("focus", () => {
    pinned = show;
    show();
  });
}

export function clear() {
  pinned = null;
  document.querySelectorAll("#rollouts .at").forEach((element) => element.classList.remove("at"));
  // The panel keeps its place, so that nothing moves under the pointer.
  fill(
    h("h2", {}, "Selected token"),
    h("p", { class: "hint" }, "Hover over a token, tap it, or move with the arrow keys, to see the teacher's numbers."),
  );
  $("#details").classList.add("idle");
}

function fill(...parts) {
  $("#details").classList.remove("idle");
  $("#details").replaceChildren(...parts.filter(Boolean));
}

const closeButton = () =>
  h(
    "button",
    { type: "button", class: "close quiet", "aria-label": "Close the details", onclick: clear },
    "✕",
  );

// ------------------------------------------------------------------------------------------------- a token

export function showToken(reply, k, cell) {
  const rollout = reply.rollouts[k];
  const count = cell.to - cell.from;
  const ids = rollout.tokens.slice(cell.from, cell.to).map((token) => token.id);
  const place = `${cell.from + 1}${count > 1 ? `–${cell.to}` : ""} of ${rollout.tokens.length}`;
  // Another teacher's numbers stand beside, where it reads the same tokens.
  const others = shown.replies.filter(
    (other) => other !== reply && ids.every((id, index) => other.rollouts[k].tokens[cell.from + index]?.id === id),
  );
  const columns = [reply, ...others].map((each) => listFacts(each, each.rollouts[k], cell, others.length > 0));
  const lines = columns[0].map(([name, , kind], index) =>
    h("div", { class: kind }, h("dt", {}, name), ...columns.map((facts) => h("dd", {}, facts[index][1]))),
  );
  const names = others.length ? h("p", { class: "names hint" }, ...[reply, ...others].map((each) => h("span", {}, each.model))) : null;
  const va = amount(sum(rollout.visual_advantage, cell), scale);
  fill(
    closeButton(),
    h(
      "h2",
      {},
      h("span", { class: "big", style: { "--a": va } }, visible(cell.text)),
      h("small", { class: "hint" }, `${count > 1 ? "ids" : "id"} ${ids.join(" ")}, ${place}`),
    ),
    count > 1 ? h("p", { class: "hint" }, `One letter of ${count} tokens; the numbers are their sums.`) : null,
    names,
    h("dl", {}, ...lines),
    drawRegions(reply, k, cell),
    drawAlternatives(rollout, cell.from),
  );
}

function listFacts(reply, rollout, cell, short) {
  const unit = short ? "" : " nats";
  const share = (logprob) => (short ? "" : ` (${percent(Math.exp(logprob))})`);
  const [teacher, degraded] = [sum(rollout.teacher_logprobs, cell), sum(rollout.degraded_logprobs, cell)];
  const divergences = rollout.columns.view_divergence_nats;
  const high = rollout.high_group.slice(cell.from, cell.to).includes(true);
  return [
    ["log p, original", nats(teacher) + share(teacher)],
    ["log p, degraded", nats(degraded) + share(degraded)],
    ["difference", nats(teacher - degraded) + unit],
    ["visual advantage", nats(sum(rollout.visual_advantage, cell)) + unit, "va"],
    ...(divergences ? [["view divergence", nats(sum(divergences, cell)) + unit]] : []),
    ["rank", rollout.ranks && cell.to - cell.from === 1 ? String(rollout.ranks[cell.from] ?? "beyond 20") : "–"],
    ["group", high ? `high${short ? "" : `, top ${Math.round(100 * reply.high_fraction)}\u00a0%`}` : "low"],
  ];
}

function drawAlternatives(rollout, t) {
  if (!rollout.alternatives) return null;
  const lines = rollout.alternatives[t].map(({ id, text, logprob }) => {
    const same = id === rollout.tokens[t].id;
    const share = percent(Math.exp(logprob));
    return h(
      "tr",
      { "aria-current": same && "true" },
      h("th", { scope: "row" }, h("code", {}, visible(text))),
      h("td", {}, h("span", { class: "bar va", style: { "--part": `${100 * Math.exp(logprob)}%` } }, share)),
    );
  });
  return h("table", {}, h("caption", { class: "label" }, "Most likely with the image"), h("tbody", {}, ...lines));
}

// ------------------------------------------------------------------------------------------------- regions

function drawRegions(reply, k, cell) {
  if (!shown.view.images.length) return null;
  const found = maps.get(reply)?.get(k);
  if (found) return h("div", { class: "regions" }, ...found.map((map, index) => drawMap(map, shown.view.images[index], cell)));
  const busy = searching?.reply === reply && searching.k === k;
  const search = () => find(reply, k, () => showToken(reply, k, cell));
  return h(
    "button",
    { type: "button", id: "find-regions", onclick: search, disabled: searching !== null, "data-busy": busy },
    busy ? "Degrading one region at a time…" : "Which region of the image?",
  );
}

async function find(reply, k, show) {
  searching = { reply, k };
  pinned = show;
  show();
  const mine = searching;
  const found = await findRegions(reply, k);
  if (mine !== searching) return; // another score is shown meanwhile
  searching = null;
  if (found) maps.set(reply, (maps.get(reply) ?? new Map()).set(k, found));
  pinned?.();
}

function drawMap({ columns, rows, losses }, image, cell) {
  const values = losses.map((loss) => sum(loss, cell));
  const most = values.indexOf(Math.max(...values));
  const scale = Math.max(1, values[most]);
  const place = `row ${Math.floor(most / columns) + 1}, column ${(most % columns) + 1}`;
  const said =
    values[most] < 0.01
      ? "No single region matters to this token."
      : `Without the detail in ${place} the token loses ${nats(values[most], 2)} nats.`;
  const tile = (value) => h("i", { style: { "--a": amount(value, scale) }, title: `loses ${nats(value, 2)} nats` });
  return h(
    "figure",
    { class: "map" },
    h(
      "div",
      { class: "frame", role: "img", "aria-label": said, style: { "--ratio": columns / rows } },
      h("img", { src: image.dataUrl, alt: "" }),
      h("div", { class: "grid", style: { "grid-template-columns": `repeat(${columns}, 1fr)`, "grid-template-rows": `repeat(${rows}, 1fr)` } }, ...values.map(tile)),
    ),
    h("figcaption", { class: "hint" }, said),
  );
}

// ------------------------------------------------------------------------------------------------- weights

/** Shows how the responses' mean VA become weights: standardised, then softmax (the method's rollout weights). */
export function showWeights(reply) {
  const means = reply.rollouts.map((rollout) => rollout.mean_visual_advantage);
  const mean = means.reduce((total, value) => total + value, 0) / means.length;
  const deviation = Math.sqrt(means.reduce((total, value) => total + (value - mean) ** 2, 0) / means.length);
  const cells = reply.rollouts.map((rollout, k) => {
    const z = (means[k] - mean) / (deviation + DEVIATION_EPS);
    return [shown.labels[k], nats(means[k]), nats(z, 2), Math.exp(z).toFixed(2), rollout.rollout_weight.toFixed(2)];
  });
  const heads = ["#", "mean VA", "z", "exp z", "weight"];
  const line = ([first, ...numbers]) =>
    h("tr", {}, h("th", { scope: "row" }, first.replace(/^Response (\d+).*/, "$1")), ...numbers.map((text) => h("td", { class: "number" }, text)));
  fill(
    closeButton(),
    h("h2", {}, "Where the weights come from"),
    h(
      "div",
      { class: "weights" },
      h("table", {}, h("thead", {}, h("tr", {}, ...heads.map((text, index) => h("th", { scope: "col", class: index && "number" }, text)))), h("tbody", {}, ...cells.map(line))),
    ),
    h(
      "p",
      { class: "hint" },
      `The means are compared with each other: z is a mean's distance from their average, ${nats(mean)} nats, divided by ` +
        `their standard deviation, ${nats(deviation)} nats. The weights are the softmax of z. So a small difference of VA ` +
        "becomes a large one of weight when all the means are close together.",
    ),
  );
}
