// Lists the runs of the API's folder: sorted by any column, each with a link to its report; ticked ones are compared.
import * as api from "./api.js";
import { $, h, percent, save } from "./dom.js";

const UPDATE_EVERY_MS = 15_000;
const STATES = ["running", "starting", "failed", "broken", "stopped", "not finished", "finished"]; // in this order
const text = (a, b) => a.localeCompare(b, undefined, { numeric: true });
const number = (a, b) => a - b;

/** Name, what a run is sorted by, and how; the largest first where `down`. */
const COLUMNS = [
  { name: "run", of: (run) => run.name, by: text },
  { name: "state", of: (run) => STATES.indexOf(run.state), by: number },
  { name: "objective", of: (run) => run.objective, by: text },
  { name: "seed", of: (run) => run.seed, by: number },
  { name: "steps", of: (run) => run.steps_done, by: number, down: true },
  { name: "accuracy before", of: (run) => run.accuracy_before, by: number, down: true },
  { name: "accuracy", of: (run) => run.accuracy, by: number, down: true },
  { name: "last change", of: (run) => Date.parse(run.changed), by: number, down: true },
];

let runs = [];
let sorted = { name: "last change", down: true };
const ticked = new Set();

function order(list) {
  const { of, by } = COLUMNS.find((column) => column.name === sorted.name);
  const compare = (a, b) => {
    const [left, right] = [of(a), of(b)];
    if (left === null || right === null) return (left === null) - (right === null); // what is missing comes last
    return sorted.down ? by(right, left) : by(left, right);
  };
  return [...list].sort(compare);
}

function sortBy(name, down) {
  sorted = { name, down };
  draw();
}

/** A link to a page of the API. Browsers send no key when a link is followed: then it is fetched, and saved as a file. */
function pageLink(address, label, fileName) {
  const link = h("a", { href: address, "data-key": address }, label);
  if (api.getKey())
    link.addEventListener("click", async (event) => {
      event.preventDefault();
      try {
        save(await api.file(address), fileName);
      } catch (error) {
        showError(error);
      }
    });
  return link;
}

function row(run) {
  const broken = run.steps_done === null; // its folder can't be read: there is no report
  const done = `${run.steps_done}${run.steps_planned === null ? "" : ` of ${run.steps_planned}`}`;
  const tick = h("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, "data-key": `tick ${run.name}`, checked: ticked.has(run.name) });
  tick.addEventListener("change", () => {
    if (tick.checked) ticked.add(run.name);
    else ticked.delete(run.name);
    drawCompare();
  });
  const cell = (label, properties, ...children) => h("td", { "data-label": label, ...properties }, ...children);
  const reason = run.reason ? h("small", { class: "hint" }, run.reason.split("\n")[0]) : null;
  return h(
    "tr",
    {},
    h("td", { class: "tick" }, broken || api.getKey() ? "" : tick),
    h("th", { scope: "row" }, broken ? run.name : pageLink(`runs/${run.name}/report`, run.name, `${run.name}.html`)),
    cell("state", { class: "state", title: run.reason }, h("b", { class: run.state.replace(" ", "-") }, run.state), reason),
    cell("objective", {}, run.objective ?? ""),
    cell("seed", {}, broken ? "" : String(run.seed)),
    cell("steps", {}, broken ? "" : done),
    cell("accuracy before", { title: run.judge_before && `judge ${run.judge_before}` }, percent(run.accuracy_before)),
    cell("accuracy", { title: run.judge && `judge ${run.judge}` }, percent(run.accuracy)),
    cell("last change", {}, new Date(run.changed).toLocaleString()),
  );
}

function head({ name, down = false }) {
  const current = sorted.name === name;
  const arrow = current ? (sorted.down ? " ↓" : " ↑") : "";
  const press = () => sortBy(name, current ? !sorted.down : down);
  const button = h("button", { type: "button", class: "quiet", onclick: press, "data-key": `sort ${name}` }, name, arrow);
  return h("th", { scope: "col", "aria-sort": current && (sorted.down ? "descending" : "ascending") }, button);
}

function sorting() {
  const options = COLUMNS.map(({ name }) => h("option", { value: name, selected: name === sorted.name }, name));
  const select = h("select", { id: "sort", "data-key": "sort" }, ...options);
  select.addEventListener("change", () => sortBy(select.value, COLUMNS.find(({ name }) => name === select.value).down ?? false));
  return h("p", { class: "row narrow" }, h("label", { for: "sort" }, "Sort by"), select);
}

function drawCompare() {
  const names = runs.map((run) => run.name).filter((name) => ticked.has(name));
  const query = names.map((name) => `run=${encodeURIComponent(name)}`).join("&");
  $("#compare").replaceChildren(
    names.length < 2
      ? h("span", { class: "hint" }, "Tick two or more to compare them.")
      : h("a", { class: "button", href: `runs/compare?${query}` }, `Compare ${names.length} runs`),
  );
}

function draw() {
  const focused = document.activeElement?.dataset.key;
  const none = h("p", {}, "There are no runs. Under vaopd up and vaopd demo, theirs are listed; else use vaopd api CONFIG --runs FOLDER.");
  const hint = api.getKey() ? "With a key, a report is downloaded as a file." : "Reports of running runs update themselves.";
  const heads = [h("td", {}), ...COLUMNS.map(head)];
  const table = h("table", { class: "runs" }, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...order(runs).map(row)));
  const parts = [
    h("p", { class: "hint" }, `Curves, rollouts coloured by VA, configuration. ${hint}`),
    api.getKey() ? null : h("p", { id: "compare", "aria-live": "polite" }),
    sorting(),
    h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of the runs" }, table),
  ];
  $("#runs").replaceChildren(h("section", { class: "card" }, ...(runs.length ? parts.filter(Boolean) : [none])));
  if ($("#compare")) drawCompare();
  if (focused) $(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

function showError(error) {
  const message = error instanceof api.Problem ? api.explain(error) : "The page failed unexpectedly; reload it.";
  $("#problem").replaceChildren(h("p", { class: "error", role: "alert" }, message));
}

async function update() {
  try {
    runs = await api.runs();
    draw();
    $("#problem").replaceChildren();
  } catch (error) {
    showError(error); // what is shown stays
    if (!runs.length) $("#runs").replaceChildren();
  }
  setTimeout(update, UPDATE_EVERY_MS);
}
await update();
document.documentElement.dataset.ready = "true";
