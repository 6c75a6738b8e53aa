// The page: reads the form, calls the API, draws its answer.
import * as api from "./api.js";
import * as charts from "./charts.js";
import { $, h, recall, remember, save } from "./dom.js";
import * as form from "./form.js";
import * as heatmap from "./heatmap.js";
import * as link from "./link.js";
import { savePng } from "./picture.js";
import * as views from "./views.js";

const RETRY_AFTER_MS = 3000;
const phone = matchMedia("(max-width: 760px)");
const systemDark = matchMedia("(prefers-color-scheme: dark)");

let known = { teachers: [], student: null };
let last = null; // { view, reply, labels } that the page shows
let scoring = null; // AbortController of the request in progress
let previewing = null; // the same for the degraded view alone

// ------------------------------------------------------------------------------------------------- asking

async function score({ quietly = false } = {}) {
  const view = form.readView();
  const problem = form.findMissing(view);
  if (problem) return showError(problem);
  clearError();
  scoring?.abort();
  const mine = (scoring = new AbortController());
  busy("Scoring…");
  const started = performance.now();
  try {
    const asked = api.score(form.requestBody(view, known), mine.signal);
    const [reply] = await Promise.all([asked, views.show(view, mine.signal)]);
    const labels = reply.rollouts.map((_, k) => (reply.rollouts.length > 1 ? `Response ${k + 1}` : "The response"));
    last = { view, reply, labels };
    draw((performance.now() - started) / 1000);
    if (phone.matches && !quietly) $("#result").scrollIntoView();
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  } finally {
    if (mine === scoring) busy(null);
  }
}

/** Scores again after a setting has changed. */
const again = () => last && score({ quietly: true });

async function sample() {
  const { question, image } = form.readView();
  if (!question) return showError(new api.Problem(422, "Type a question", "question"));
  clearError();
  busy(known.student.loaded ? "The student is answering…" : "Loading the student…");
  const settings = { num_responses: Number($("#count").value), seed: Math.floor(Math.random() * 2 ** 31) };
  try {
    const answer = await api.sample({ question, ...(image && { image: image.dataUrl }), ...settings });
    known.student = { ...known.student, loaded: true, tokenizer_fingerprint: answer.tokenizer_fingerprint };
    form.setAnswers(answer.responses.map((response) => [response.text, response.token_ids, answer.model]));
  } catch (error) {
    busy(null);
    return showError(error);
  }
  return score();
}

/** Updates the degraded view alone, while its strength is being changed. */
async function preview() {
  if (!last?.view.image) return;
  previewing?.abort();
  previewing = new AbortController();
  const { degradation, strength } = form.readView();
  try {
    await views.show({ ...last.view, degradation, strength }, previewing.signal);
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  }
}

async function take(file, example) {
  clearError();
  try {
    await form.takeFile(file, example);
  } catch (error) {
    showError(error);
  }
}

// ------------------------------------------------------------------------------------------------- showing

function draw(seconds) {
  const { view, reply, labels } = last;
  $("#welcome").hidden = true;
  $("#result").hidden = false;
  charts.drawFigures(reply, seconds);
  heatmap.draw(reply, labels);
  charts.drawHistogram(reply);
  charts.drawTables(reply, labels);
  $("#status").textContent = charts.summary(reply);
  $("#link-hint").textContent = link.write(view)
    ? "The address of this page contains everything shown here."
    : "The address of this page contains question, responses and settings. The image is too large for it: choose it " +
      "again after opening the link.";
}

/** Shows `text` on the button while a request is in progress; null afterwards. */
function busy(text) {
  $("#score").disabled = $("#sample").disabled = text !== null;
  $("#score").textContent = text ?? "Score";
  $("#result").setAttribute("aria-busy", String(text !== null));
}

function showError(problem) {
  const expected = problem instanceof api.Problem;
  if (!expected) console.error(problem);
  $("#error").replaceChildren(h("b", {}, expected ? api.explain(problem) : "The page failed unexpectedly; reload it."));
  if (problem.requestId) $("#error").append(h("div", { class: "hint" }, `Request ${problem.requestId}`));
  $("#error").hidden = false;
  if ([401, 403].includes(problem.status)) $("#key-field").hidden = false;
  form.mark(problem.field);
  $("#error").scrollIntoView({ block: "nearest" });
}

function clearError() {
  $("#error").hidden = true;
  form.unmark();
}

function setTheme(theme) {
  if (theme) {
    document.documentElement.dataset.theme = theme;
    remember("localStorage", "vaopd.theme", theme);
  }
  $("#theme").setAttribute("aria-pressed", String(theme ? theme === "dark" : systemDark.matches));
}

function otherTheme() {
  const now = document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light");
  setTheme(now === "dark" ? "light" : "dark");
}

// ------------------------------------------------------------------------------------------------- keeping

async function copyLink() {
  link.write(last.view);
  try {
    await navigator.clipboard.writeText(location.href);
    $("#link-hint").textContent = "The link is copied.";
  } catch {
    $("#link-hint").textContent = "The browser does not allow copying here; copy the link from the address bar.";
  }
  $("#status").textContent = $("#link-hint").textContent;
}

function saveJson() {
  const { image, ...view } = last.view;
  const text = JSON.stringify({ ...view, image: image?.name ?? null, ...last.reply }, null, 1);
  save(new Blob([text], { type: "application/json" }), "visual-advantage.json");
}

// ------------------------------------------------------------------------------------------------- the start

async function loadTeachers() {
  try {
    known.teachers = await api.teachers();
    const [students, runs] = await Promise.all([api.students(), api.runs()]);
    known.student = students[0] ?? null;
    $("#runs").hidden = !runs.length;
  } catch (error) {
    if (error.status === 503) setTimeout(loadTeachers, RETRY_AFTER_MS); // the teacher may still be loading
    return showError(error);
  }
  clearError();
  form.fillTeachers(known.teachers);
  $("#sampling").hidden = !known.student;
  if (known.student) $("#sample").title = known.student.model;
}

async function exampleImage(name) {
  const blob = await (await fetch(`page/examples/${name}.png`)).blob();
  await take(new File([blob], `${name}.png`, { type: "image/png" }), name);
}

async function loadExamples() {
  const list = await api.examples();
  const button = (example) => {
    const choose = async () => {
      await exampleImage(example.name);
      $("#question").value = example.question;
      form.setAnswers(example.responses.map((text) => [text]));
      await score();
    };
    const picture = h("img", { src: `page/examples/${example.name}.png`, alt: "", width: "96", height: "96" });
    return h("button", { type: "button", title: example.question, onclick: choose }, picture, example.name);
  };
  $("#examples .thumbs").replaceChildren(...list.map(button));
  $("#examples").hidden = false;
  return list;
}

async function restore(wanted, examples) {
  $("#question").value = wanted.question;
  form.setAnswers(wanted.responses.map((text) => [text]));
  if (known.teachers.some((each) => each.model === wanted.teacher)) $("#teacher").value = wanted.teacher;
  form.fillDegradations(known.teachers, wanted.degradation || "pixelate");
  if (wanted.strength > 0 && wanted.strength <= 1) $("#strength").value = wanted.strength;
  form.settleStrength();
  if (wanted.dataUrl) form.setImage({ dataUrl: wanted.dataUrl, name: "image from the link" });
  else if (examples.some((each) => each.name === wanted.example)) await exampleImage(wanted.example);
  else if (wanted.imageLeftOut) return; // the user has to choose it again
  await score();
}

function listen() {
  const on = (selector, kind, act) => $(selector).addEventListener(kind, act);
  on("#form", "submit", (event) => {
    event.preventDefault();
    score();
  });
  on("#add", "click", () => form.addAnswer().focus());
  on("#sample", "click", sample);
  on("#file", "change", (event) => take(event.target.files[0]));
  on("#clear-image", "click", () => {
    form.setImage(null);
    $("#file").focus();
  });
  on("#key", "change", (event) => {
    api.setKey(event.target.value);
    loadTeachers();
  });
  on("#teacher", "change", () => {
    form.fillDegradations(known.teachers);
    again();
  });
  on("#degradation", "change", () => {
    form.settleStrength();
    again();
  });
  on("#strength", "input", () => {
    form.settleStrength();
    preview();
  });
  on("#strength", "change", again);
  for (const [button, divergence] of [
    ["#by-va", false],
    ["#by-divergence", true],
  ])
    on(button, "click", () => {
      heatmap.colourBy(divergence);
      heatmap.draw(last.reply, last.labels);
    });
  on("#copy-link", "click", copyLink);
  on("#save-json", "click", saveJson);
  on("#save-png", "click", () => savePng(last.view, last.reply, last.labels));
  on("#theme", "click", otherTheme);
  listenForFiles();
  views.listen();
}

/** Takes images that are dropped anywhere, or pasted. */
function listenForFiles() {
  const over = (now) => (event) => {
    event.preventDefault();
    $("#drop").classList.toggle("over", now);
  };
  for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, over(true));
  for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, over(false));
  document.addEventListener("drop", (event) => take(event.dataTransfer.files[0]));
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (!file) return;
    event.preventDefault();
    take(file);
  });
}

setTheme(recall("localStorage", "vaopd.theme"));
$("#key").value = api.getKey();
form.setAnswers([]);
form.settleStrength();
views.showAs(phone.matches ? "slider" : "pair");
listen();
const [examples] = await Promise.all([loadExamples().catch(() => []), loadTeachers()]);
const wanted = link.read();
if (wanted) await restore(wanted, examples);
document.documentElement.dataset.ready = "true";
