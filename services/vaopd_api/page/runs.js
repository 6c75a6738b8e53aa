// Lists the runs of the API's folder, each with a link to its report.
import * as api from "./api.js";
import { $, h, percent, save } from "./dom.js";

const COLUMNS = ["run", "objective", "seed", "steps", "state", "accuracy before", "accuracy", "last change"];
const UPDATE_EVERY_MS = 15_000;

function accuracy(share, judge) {
  return h("td", judge ? { title: `judge ${judge}` } : {}, percent(share));
}

function row(run) {
  const address = `runs/${run.name}/report`;
  const link = h("a", { href: address }, run.name);
  // Browsers send no key when a link is followed: the report is fetched with the key, and saved as a file.
  if (api.getKey())
    link.addEventListener("click", async (event) => {
      event.preventDefault();
      try {
        save(await api.file(address), `${run.name}.html`);
      } catch (error) {
        showError(error);
      }
    });
  const broken = run.steps_done === null; // its folder can't be read: there is no report
  const steps = broken ? "" : run.steps_planned === null ? String(run.steps_done) : `${run.steps_done} of ${run.steps_planned}`;
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, broken ? run.name : link),
    h("td", {}, run.objective ?? ""),
    h("td", {}, broken ? "" : String(run.seed)),
    h("td", {}, steps),
    h("td", run.reason ? { title: run.reason } : {}, run.state, ...(run.reason ? [h("small", {}, ` ${run.reason.split("\n")[0]}`)] : [])),
    accuracy(run.accuracy_before, run.judge_before),
    accuracy(run.accuracy, run.judge),
    h("td", {}, new Date(run.changed).toLocaleString()),
  );
}

function draw(runs) {
  const heads = COLUMNS.map((name) => h("th", { scope: "col" }, name));
  const table = h("table", {}, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...runs.map(row)));
  const none = h("p", {}, "There are no runs. Under vaopd up and vaopd demo, theirs are listed; else use vaopd api CONFIG --runs FOLDER.");
  const hint = api.getKey() ? "With a key, a report is downloaded as a file." : "Reports of running runs update themselves.";
  $("#runs").replaceChildren(
    runs.length
      ? h(
          "section",
          { class: "card" },
          h("p", { class: "hint" }, `Curves, rollouts coloured by VA, configuration. ${hint}`),
          h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of the runs" }, table),
        )
      : h("section", { class: "card" }, none),
  );
}

function showError(error) {
  const message = error instanceof api.Problem ? api.explain(error) : "The page failed unexpectedly; reload it.";
  $("#runs").replaceChildren(h("p", { class: "error", role: "alert" }, message));
}

async function update() {
  try {
    const runs = await api.runs();
    if (!$("#runs").contains(document.activeElement)) draw(runs); // don't take the focus away
  } catch (error) {
    showError(error);
  }
  setTimeout(update, UPDATE_EVERY_MS);
}
await update();
document.documentElement.dataset.ready = "true";
