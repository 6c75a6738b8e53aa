// The tokens of every response, coloured by VA or by view divergence: as running text, or one tile per token.
import { amount, makeCells, sum } from "./cells.js";
import * as details from "./details.js";
import { $, h, nats, visible } from "./dom.js";

const AGAINST_NATS = 1; // from this difference on, the image speaks against a token

let byDivergence = false; // what the colours show
let tiles = false; // whether each token is a tile of its own
let rows = []; // the tokens' elements by response, and by teacher where two are compared

const divergencesOf = (rollout) => rollout.columns.view_divergence_nats;
const scoresOf = (rollout) => (byDivergence && divergencesOf(rollout)) || rollout.visual_advantage;

const press = (selector, pressed) => $(selector).setAttribute("aria-pressed", String(pressed));

/** Colours the tokens by view divergence, or by VA; takes effect with the next `draw`. */
export function colourBy(divergence) {
  byDivergence = divergence;
  press("#by-va", !divergence);
  press("#by-divergence", divergence);
}

/** Shows tiles, one for each token, or running text; takes effect with the next `draw`. */
export function arrange(asTiles) {
  tiles = asTiles;
  press("#as-text", !asTiles);
  press("#as-tokens", asTiles);
}

/** Draws what is `shown`: { view, replies, labels }; two replies are two teachers' of the same responses. */
export function draw(shown) {
  const { view, replies, labels } = shown;
  const rollouts = replies.flatMap((reply) => reply.rollouts);
  const scale = Math.max(1, ...rollouts.flatMap(scoresOf));
  $("#colour-by").hidden = !rollouts.every(divergencesOf);
  $("#heat-title").textContent = `Tokens by ${byDivergence ? "view divergence" : "visual advantage"}`;
  $("#ramp-end").textContent = `${scale.toFixed(1)} nats`;
  $("#no-va").hidden = rollouts.some(helps);
  $("#no-va").textContent = view.images.length
    ? "The image makes no token more likely: VA is 0 everywhere, so there is no high group."
    : "There is no image: both views of the question are the same, so VA is 0 everywhere, and there is no high group. " +
      "Choose an image to see which tokens depend on it.";
  details.begin(shown, scale);
  rows = [];
  $("#rollouts").replaceChildren(...labels.map((label, k) => drawResponse(shown, k, scale, label)));
  if (rows[0]?.[0]) rows[0][0].tabIndex = 0;
}

const helps = (rollout) => rollout.visual_advantage.some((va) => va > 0);

function drawResponse({ view, replies }, k, scale, label) {
  const versions = replies.map((reply) => {
    const rollout = reply.rollouts[k];
    const facts = [
      `mean VA ${nats(rollout.mean_visual_advantage)} nats`,
      `${rollout.tokens.length} tokens`,
      !helps(rollout) && "no high group",
    ];
    const head = h("div", { class: "head" }, replies.length > 1 ? h("b", {}, reply.model) : h("h3", {}, label));
    if (reply.rollouts.length > 1) head.append(weightButton(reply, k));
    head.append(h("span", { class: "facts" }, facts.filter(Boolean).join(" · ")));
    const name = replies.length > 1 ? `${label}, ${reply.model}` : label;
    return h("div", { class: "version" }, head, tokenRow(reply, k, scale, view.responses[k] ?? "", name));
  });
  const title = replies.length > 1 ? h("h3", {}, label) : null;
  return h("section", { class: "rollout", "aria-label": label }, title, h("div", { class: "versions" }, ...versions));
}

function weightButton(reply, k) {
  const weight = reply.rollouts[k].rollout_weight;
  const button = h(
    "button",
    { type: "button", class: "weight quiet", title: "Why this weight?" },
    h("span", { class: "meter", style: { "--part": `${100 * weight}%` } }),
    `weight ${weight.toFixed(2)}`,
  );
  details.follow(button, () => details.showWeights(reply));
  return button;
}

function tokenRow(reply, k, scale, written, name) {
  const rollout = reply.rollouts[k];
  const row = h("div", {
    class: `tokens ${tiles ? "tiles" : "text"}`,
    role: "toolbar",
    dir: "auto", // Hebrew and Arabic read from the right
    "aria-label": `Tokens of ${name}`,
    "aria-describedby": "keys-hint",
  });
  const elements = makeCells(rollout.tokens, written).map((cell) => {
    const element = tokenElement(rollout, cell, scale);
    details.follow(element, () => {
      rows.flat().forEach((other) => other.classList.toggle("at", other === element));
      details.showToken(reply, k, cell);
    });
    element.addEventListener("keydown", (event) => move(event, element));
    row.append(element);
    if (tiles && cell.text.includes("\n")) row.append(h("span", { class: "break" }));
    return element;
  });
  rows.push(elements);
  return row;
}

function tokenElement(rollout, cell, scale) {
  const va = sum(rollout.visual_advantage, cell);
  const against = sum(rollout.teacher_logprobs, cell) - sum(rollout.degraded_logprobs, cell) < -AGAINST_NATS;
  const high = rollout.high_group.slice(cell.from, cell.to).includes(true);
  const divergences = divergencesOf(rollout);
  const count = cell.to - cell.from;
  const said = [
    visible(cell.text),
    `token ${cell.from + 1}${count > 1 ? ` to ${cell.to}` : ""} of ${rollout.tokens.length}`,
    `visual advantage ${va.toFixed(2)} nats`,
    divergences && `view divergence ${sum(divergences, cell).toFixed(2)} nats`,
    high && "high group",
    against && "the image speaks against it",
    rollout.ranks && count === 1 && `rank ${rollout.ranks[cell.from] ?? "beyond 20"}`,
  ];
  const end = /^<\|.*\|>$/.test(cell.text);
  return h(
    "span",
    {
      role: "button",
      tabindex: "-1",
      class: `token${high ? " high" : ""}${against ? " against" : ""}${end ? " end" : ""}`,
      "aria-label": said.filter(Boolean).join(", "),
      style: { "--a": amount(sum(scoresOf(rollout), cell), scale) },
    },
    ...(tiles ? tileText(cell.text) : [end ? " end" : cell.text]),
  );
}

function tileText(text) {
  const lead = /^ +/.exec(text)?.[0].length ?? 0;
  return [h("span", { class: "space" }, "·".repeat(lead)), text.slice(lead).replaceAll("\n", "↵")];
}

function move(event, from) {
  const all = rows.flat();
  const at = all.indexOf(from);
  const row = rows.find((each) => each.includes(from));
  let next = { ArrowRight: all[at + 1], ArrowLeft: all[at - 1], Home: row[0], End: row.at(-1) }[event.key];
  if (event.key === "ArrowDown" || event.key === "ArrowUp") next = findInNextLine(from, event.key === "ArrowDown" ? 1 : -1);
  else if (event.key === "Escape") {
    from.blur();
    details.clear();
    return;
  } else if (!["ArrowRight", "ArrowLeft", "Home", "End"].includes(event.key)) return;
  event.preventDefault();
  if (!next) return;
  all.forEach((element) => {
    element.tabIndex = element === next ? 0 : -1;
  });
  next.focus();
}

/** Returns the nearest token of the line above or below, also of another response. */
function findInNextLine(from, direction) {
  const here = from.getBoundingClientRect();
  const beyond = rows
    .flat()
    .map((element) => [element, element.getBoundingClientRect()])
    .filter(([, box]) => direction * (box.top - here.top) > here.height / 2);
  const distance = (box) =>
    Math.abs(box.top - here.top) * 1000 + Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
  return beyond.sort(([, a], [, b]) => distance(a) - distance(b))[0]?.[0];
}
