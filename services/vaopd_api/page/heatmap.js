// The tokens of every response, coloured by VA or by view divergence, and the details of the selected one.
import { $, h, nats, percent, visible } from "./dom.js";

const AGAINST_NATS = 1; // from this difference on, the image speaks against a token
const EXPONENT = 0.5; // colour grows with the root of VA, so that small values show

let byDivergence = false; // what the colours show
let rows = []; // the token buttons of each response, in order
let pinned = null; // the token whose details stay after hovering over others

const divergencesOf = (rollout) => rollout.columns.view_divergence_nats;
const scoresOf = (rollout) => (byDivergence && divergencesOf(rollout)) || rollout.visual_advantage;
const amount = (score, scale) => `${(100 * (score / scale) ** EXPONENT).toFixed(1)}%`;

/** Colours the tokens by view divergence, or by VA; takes effect with the next `draw`. */
export function colourBy(divergence) {
  byDivergence = divergence;
  $("#by-va").setAttribute("aria-pressed", String(!divergence));
  $("#by-divergence").setAttribute("aria-pressed", String(divergence));
}

export function draw(reply, labels) {
  const scale = Math.max(1, ...reply.rollouts.flatMap(scoresOf));
  $("#colour-by").hidden = !divergencesOf(reply.rollouts[0]);
  $("#heat-title").textContent = `Tokens by ${byDivergence ? "view divergence" : "visual advantage"}`;
  $("#ramp-end").textContent = `${scale.toFixed(1)} nats`;
  $("#details").hidden = false;
  hideDetails();
  rows = [];
  $("#rollouts").replaceChildren(...reply.rollouts.map((rollout, k) => card(reply, rollout, k, scale, labels[k])));
  if (rows[0]?.[0]) rows[0][0].tabIndex = 0;
}

function card(reply, rollout, k, scale, label) {
  const tokens = h("div", {
    class: "tokens",
    role: "toolbar",
    "aria-label": `Tokens of ${label}`,
    "aria-describedby": "keys-hint",
  });
  rows[k] = rollout.tokens.map((token, t) => {
    const button = tokenButton(rollout, t, scale);
    const show = () => showDetails(reply, k, t, scale);
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show());
    button.addEventListener(
      "pointerleave",
      (event) => event.pointerType === "mouse" && (pinned ? pinned.show() : hideDetails()),
    );
    button.addEventListener("focus", () => {
      pinned = { button, show };
      show();
    });
    button.addEventListener("keydown", (event) => move(event, k, t));
    tokens.append(button);
    if (token.text.includes("\n")) tokens.append(h("span", { class: "break" }));
    return button;
  });
  const weight =
    reply.rollouts.length > 1
      ? h(
          "span",
          { class: "weight" },
          h("span", { class: "meter", style: { "--part": `${100 * rollout.rollout_weight}%` } }),
          `weight ${rollout.rollout_weight.toFixed(2)}`,
        )
      : null;
  return h(
    "section",
    { class: "rollout", "aria-label": label },
    h(
      "div",
      { class: "head" },
      h("h3", {}, label),
      weight,
      h(
        "span",
        { class: "weight" },
        `mean VA ${nats(rollout.mean_visual_advantage)} nats · ${rollout.tokens.length} tokens`,
      ),
    ),
    tokens,
  );
}

function tokenButton(rollout, t, scale) {
  const { text } = rollout.tokens[t];
  const va = rollout.visual_advantage[t];
  const against = difference(rollout, t) < -AGAINST_NATS;
  const high = rollout.high_group[t];
  const divergence = divergencesOf(rollout)?.[t];
  const said = [
    `${visible(text)}`,
    `token ${t + 1} of ${rollout.tokens.length}`,
    `visual advantage ${va.toFixed(2)} nats`,
    divergence !== undefined && `view divergence ${divergence.toFixed(2)} nats`,
    high && "high group",
    against && "the image speaks against it",
    rollout.ranks && `rank ${rollout.ranks[t] ?? "beyond 20"}`,
  ];
  const lead = /^ +/.exec(text)?.[0].length ?? 0;
  return h(
    "button",
    {
      type: "button",
      tabindex: "-1",
      class: `token${high ? " high" : ""}${against ? " against" : ""}`,
      "aria-label": said.filter(Boolean).join(", "),
      style: { "--a": amount(scoresOf(rollout)[t], scale) },
    },
    h("span", { class: "space" }, "·".repeat(lead)),
    text.slice(lead).replaceAll("\n", "↵"),
  );
}

const difference = (rollout, t) => rollout.teacher_logprobs[t] - rollout.degraded_logprobs[t];

function move(event, k, t) {
  const beyond = { ArrowRight: [k, t + 1], ArrowLeft: [k, t - 1], Home: [k, 0], End: [k, rows[k].length - 1] }[
    event.key
  ];
  let next = null;
  if (beyond)
    next = rows[beyond[0]][beyond[1]] ?? (event.key === "ArrowRight" ? rows[k + 1]?.[0] : rows[k - 1]?.at(-1));
  else if (event.key === "ArrowDown" || event.key === "ArrowUp")
    next = findInNextLine(rows[k][t], event.key === "ArrowDown" ? 1 : -1);
  else if (event.key === "Escape") {
    pinned = null;
    rows[k][t].blur();
    hideDetails();
    return;
  } else return;
  event.preventDefault();
  if (!next) return;
  rows.flat().forEach((button) => {
    button.tabIndex = button === next ? 0 : -1;
  });
  next.focus();
}

/** Returns the nearest token of the line above or below, also of another response. */
function findInNextLine(from, direction) {
  const here = from.getBoundingClientRect();
  const beyond = rows
    .flat()
    .map((button) => [button, button.getBoundingClientRect()])
    .filter(([, box]) => direction * (box.top - here.top) > here.height / 2);
  const distance = (box) =>
    Math.abs(box.top - here.top) * 1000 + Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
  return beyond.sort(([, a], [, b]) => distance(a) - distance(b))[0]?.[0];
}

function hideDetails() {
  pinned = null;
  // The panel keeps its place, so that nothing moves under the pointer.
  $("#details").classList.add("idle");
  $("#details").replaceChildren(
    h("h2", {}, "Selected token"),
    h(
      "p",
      { class: "hint" },
      "Hover over a token, tap it, or move with the arrow keys, to see the teacher's numbers.",
    ),
  );
  rows.flat().forEach((button) => button.classList.remove("at"));
}

function showDetails(reply, k, t, scale) {
  const rollout = reply.rollouts[k];
  rows.flat().forEach((button) => button.classList.remove("at"));
  rows[k][t].classList.add("at");
  const [teacher, degraded, va] = [
    rollout.teacher_logprobs[t],
    rollout.degraded_logprobs[t],
    rollout.visual_advantage[t],
  ];
  const facts = [
    ["log p, original", `${nats(teacher)} (${percent(Math.exp(teacher))})`],
    ["log p, degraded", `${nats(degraded)} (${percent(Math.exp(degraded))})`],
    ["difference", `${nats(teacher - degraded)} nats`],
    ["visual advantage", `${nats(va)} nats`, "va"],
    ...(divergencesOf(rollout) ? [["view divergence", `${nats(divergencesOf(rollout)[t])} nats`]] : []),
    ["rank", rollout.ranks ? String(rollout.ranks[t] ?? "beyond 20") : "–"],
    ["group", rollout.high_group[t] ? `high, top ${Math.round(100 * reply.high_fraction)}\u00a0%` : "low"],
  ];
  $("#details").replaceChildren(
    h("button", { type: "button", class: "close quiet", "aria-label": "Close the details", onclick: hideDetails }, "✕"),
    h(
      "h2",
      {},
      h("span", { class: "big", style: { "--a": amount(scoresOf(rollout)[t], scale) } }, visible(rollout.tokens[t].text)),
      h("small", { class: "hint" }, `id ${rollout.tokens[t].id}, ${t + 1} of ${rollout.tokens.length}`),
    ),
    h(
      "dl",
      {},
      ...facts.map(([name, value, kind]) =>
        h("div", { class: kind }, h("dt", {}, name), h("dd", {}, value)),
      ),
    ),
    drawAlternatives(rollout, t),
  );
  $("#details").classList.remove("idle");
}

function drawAlternatives(rollout, t) {
  if (!rollout.alternatives) return h("p", {});
  const lines = rollout.alternatives[t].map(({ id, text, logprob }) => {
    const same = id === rollout.tokens[t].id;
    return h(
      "tr",
      { "aria-current": same && "true" },
      h("th", { scope: "row" }, h("code", {}, visible(text))),
      h(
        "td",
        {},
        h("span", { class: "bar va", style: { "--part": `${100 * Math.exp(logprob)}%` } }, percent(Math.exp(logprob))),
      ),
    );
  });
  return h(
    "table",
    {},
    h("caption", { class: "label" }, "Most likely with the image"),
    h("tbody", {}, ...lines),
  );
}
