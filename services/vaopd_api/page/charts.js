// The summary, the histogram and the tables. All are text or tables, so that screen readers can read them.
import { $, h, nats, percent, visible } from "./dom.js";

const EDGES = [0, 0.01, 0.03, 0.1, 0.3, 1, 3, Infinity]; // nats; VA spans orders of magnitude

const countTokens = (reply) => reply.rollouts.reduce((sum, rollout) => sum + rollout.tokens.length, 0);

/** Returns how VA is spread over the tokens, in a sentence or two. */
export function summary(reply) {
  const scored = `Scored ${countTokens(reply)} tokens`;
  if (reply.share_of_top_10 === null) return `${scored}. Seeing the image helps with none of them.`;
  const [tenth, fifth] = [percent(reply.share_of_top_10), percent(reply.share_of_top_20)];
  return `${scored}. The top 10 % carry ${tenth} of the visual advantage, the top 20 % carry ${fifth}.`;
}

export function drawHistogram(reply) {
  const all = reply.rollouts.flatMap((rollout) => rollout.visual_advantage);
  const total = all.reduce((sum, va) => sum + va, 0);
  const lines = EDGES.slice(0, -1).map((low, index) => {
    const inside = all.filter((va) => va >= low && va < EDGES[index + 1]);
    const share = total > 0 ? inside.reduce((sum, va) => sum + va, 0) / total : 0;
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, EDGES[index + 1] === Infinity ? `${low} and more` : `${low} – ${EDGES[index + 1]}`),
      bar(inside.length / all.length, `${percent(inside.length / all.length)}`, ""),
      bar(share, percent(share), "va"),
    );
  });
  $("#histogram").replaceChildren(
    h("p", { class: "hint" }, summary(reply)),
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, "VA, nats"),
          h("th", { scope: "col" }, "tokens"),
          h("th", { scope: "col" }, "share of all VA"),
        ),
      ),
      h("tbody", {}, ...lines),
    ),
  );
}

const bar = (part, text, kind) =>
  h("td", {}, h("span", { class: `bar ${kind}`, style: { "--part": `${100 * part}%` } }, text));

const COLUMNS = ["#", "token", "original", "degraded", "VA", "rank", "group"];
const NUMBERS = ["original", "degraded", "VA", "rank"];

export function drawTables({ replies, labels }) {
  const tables = replies.flatMap((reply) =>
    reply.rollouts.map((rollout, k) =>
      tokenTable(rollout, replies.length > 1 ? `${labels[k]}, ${reply.model}` : labels[k]),
    ),
  );
  $("#tables > div").replaceChildren(...tables);
}

function tokenTable(rollout, label) {
  const caption = `${label}: log-probs and VA in nats, weight ${rollout.rollout_weight.toFixed(3)}`;
  const heads = COLUMNS.map((name) => h("th", { scope: "col", class: NUMBERS.includes(name) && "number" }, name));
  const number = (text) => h("td", { class: "number" }, text);
  const rows = rollout.tokens.map((token, t) =>
    h(
      "tr",
      {},
      h("td", {}, String(t + 1)),
      h("th", { scope: "row" }, visible(token.text)),
      number(nats(rollout.teacher_logprobs[t])),
      number(nats(rollout.degraded_logprobs[t])),
      number(nats(rollout.visual_advantage[t])),
      number(rollout.ranks ? String(rollout.ranks[t] ?? "> 20") : "–"),
      h("td", {}, rollout.high_group[t] ? "high" : "low"),
    ),
  );
  return h(
    "div",
    { class: "scroll", role: "region", tabindex: "0", "aria-label": `Table of ${label}` },
    h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...rows)),
  );
}
