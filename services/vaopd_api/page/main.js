// The page: reads the form, calls the API, draws its answer.
import * as api from "./api.js";
import * as charts from "./charts.js";
import * as details from "./details.js";
import { $, h, recall, remember, save } from "./dom.js";
import * as form from "./form.js";
import * as heatmap from "./heatmap.js";
import * as link from "./link.js";
import { savePng } from "./picture.js";
import * as views from "./views.js";

const RETRY_AFTER_MS = 3000;
const OUTAGES = [0, 502, 503]; // the API or the teacher doesn't answer, and may soon
const phone = matchMedia("(max-width: 760px)");
const systemDark = matchMedia("(prefers-color-scheme: dark)");

let known = { teachers: [], students: [] };
let last = null; // { view, replies, labels } that the page shows
let scoring = null; // AbortController of the request in progress
let previewing = null; // the same for the degraded view alone
let problem = null; // the one that the page shows
let lookingAgain = null; // the timer that waits for the API or the teacher

// ------------------------------------------------------------------------------------------------- asking

/** `by`: the button that was pressed, which shows the progress; null after a change of settings. */
async function score(by = $("#score")) {
  const view = form.readView();
  const missing = form.findMissing(view);
  if (missing) return showError(missing);
  clearError();
  scoring?.abort();
  const mine = (scoring = new AbortController());
  busy("Scoring…", by);
  const started = performance.now();
  try {
    const models = [view.teacher, ...(view.other && view.other !== view.teacher ? [view.other] : [])];
    const asked = models.map((model) => api.score(form.requestBody(view, known, model), mine.signal));
    const [degraded, ...replies] = await Promise.all([views.load(view, mine.signal), ...asked]);
    const labels = view.responses.map((_, k) => {
      const name = view.responses.length > 1 ? `Response ${k + 1}` : "The response";
      return view.by[k] && known.students.length > 1 ? `${name}, ${view.by[k]}` : name;
    });
    last = { view, replies, labels, degraded };
    await views.show(view, degraded);
    draw((performance.now() - started) / 1000);
    if (phone.matches && by) $("#result").scrollIntoView();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (last) await views.show(last.view, last.degraded); // what is shown belongs together
    showError(error);
  } finally {
    if (mine === scoring) busy(null);
  }
}

/** Scores again after a setting has changed. */
const again = () => last && score(null);

async function sample() {
  const view = form.readView();
  if (!view.question) return showError(new api.Problem(422, "Type a question", "question"));
  clearError();
  const asked = known.students.filter((each) => !$("#student").value || each.model === $("#student").value);
  const settings = { num_responses: Number($("#count").value), seed: Math.floor(Math.random() * 2 ** 31) };
  try {
    const found = [];
    for (const student of asked) {
      busy(`${student.loaded ? "Asking" : "Loading"} ${asked.length > 1 ? student.model : "the student"}…`, $("#sample"));
      const answer = await api.sample({ ...form.promptOf(view), ...settings, student: student.model });
      student.loaded = true;
      found.push(...answer.responses.map((response) => [response.text, response.token_ids, answer]));
    }
    form.setAnswers(found);
  } catch (error) {
    busy(null);
    return showError(error);
  }
  return score($("#sample"));
}

/** Updates the degraded views alone, while their strength is being changed. */
async function preview() {
  if (!last?.view.images.length) return;
  previewing?.abort();
  previewing = new AbortController();
  const { degradation, strength } = form.readView();
  const view = { ...last.view, degradation, strength };
  try {
    await views.show(view, await views.load(view, previewing.signal));
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  }
}

/** Returns what each token of response k loses without each region, one reply for each image; null after a problem. */
async function findRegions(reply, k) {
  const { view } = last;
  const degradation = { kind: view.degradation, strength: view.strength };
  const response = reply.rollouts[k].tokens.map((token) => token.id);
  const ask = { ...form.promptOf(view), degradation, teacher: reply.model, response };
  try {
    const found = [];
    for (const picture of view.images.keys()) found.push(await api.regions({ ...ask, picture }));
    return found;
  } catch (error) {
    showError(error);
    return null;
  }
}

async function take(files, settings) {
  clearError();
  try {
    await form.takeFiles(files, settings);
  } catch (error) {
    showError(error);
  }
}

// ------------------------------------------------------------------------------------------------- showing

function draw(seconds) {
  const { view, replies } = last;
  $("#welcome").hidden = true;
  $("#result").hidden = false;
  heatmap.draw(last);
  charts.drawHistogram(replies[0]);
  charts.drawTables(last);
  $("#facts").textContent = `${seconds.toFixed(1)}\u00a0s`;
  $("#status").textContent = charts.summary(replies[0]);
  $("#link-hint").textContent = link.write(view)
    ? "The address of this page contains everything shown here."
    : "The address of this page contains question, responses and settings. The images are too large for it: choose them " +
      "again after opening the link.";
}

/** Shows `text` on the button that was pressed while a request is in progress; null afterwards. */
function busy(text, pressed = null) {
  for (const button of document.querySelectorAll("#score, #sample, #examples button")) {
    const place = $(".caption", button) ?? button;
    button.disabled = text !== null;
    button.dataset.name ??= place.textContent;
    place.textContent = button === pressed && text ? text : button.dataset.name;
    button.toggleAttribute("data-busy", button === pressed);
  }
  $("#result").setAttribute("aria-busy", String(text !== null));
}

function showError(error) {
  const expected = error instanceof api.Problem;
  if (!expected) console.error(error);
  const said = expected ? api.explain(error) : "The page failed unexpectedly; reload it.";
  const waiting = OUTAGES.includes(error.status);
  if (waiting) lookingAgain ??= setTimeout(lookAgain, RETRY_AFTER_MS);
  if (problem?.said === said) return; // it is read out once
  problem = { said, status: error.status };
  $("#error").replaceChildren(h("b", {}, said));
  if (waiting && last) $("#error").append(h("div", {}, "What is shown stays. This message goes when it works again."));
  if (error.requestId) $("#error").append(h("div", { class: "hint" }, `Request ${error.requestId}`));
  $("#error").hidden = false;
  if ([401, 403].includes(error.status)) $("#key-field").hidden = false;
  form.mark(error.field);
  $("#error").scrollIntoView({ block: "nearest" });
}

function clearError() {
  problem = null;
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
  const { images, by, ...view } = last.view;
  const [reply, other] = last.replies;
  const kept = { ...view, images: images.map((image) => image.name), ...reply, ...(other && { compared_with: other }) };
  const text = JSON.stringify(kept, null, 1);
  save(new Blob([text], { type: "application/json" }), "visual-advantage.json");
}

// ------------------------------------------------------------------------------------------------- the start

/** Reads what the API offers. What can't be read stays as it was; the first problem is shown. */
async function load() {
  const [teachers, students, runs] = await Promise.allSettled([api.teachers(), api.students(), api.runs()]);
  if (teachers.value) {
    known.teachers = teachers.value;
    form.fillTeachers(known.teachers);
  }
  if (students.value) {
    known.students = students.value;
    $("#sampling").hidden = !known.students.length;
    $("#student").hidden = known.students.length < 2;
    const each = known.students.map(({ model }) => h("option", { value: model }, model));
    $("#student").replaceChildren(h("option", { value: "" }, "all students"), ...each);
    if (known.students.length) $("#sample").title = known.students[0].model;
  }
  if (runs.value) $("#runs").hidden = !runs.value.length;
  const failed = [teachers, students, runs].find((each) => each.reason);
  if (failed) showError(failed.reason);
  else if ([...OUTAGES, 401, 403].includes(problem?.status)) clearError();
}

function lookAgain() {
  lookingAgain = null;
  return load();
}

async function exampleImage(name) {
  const blob = await (await fetch(`page/examples/${name}.png`)).blob();
  await take([new File([blob], `${name}.png`, { type: "image/png" })], { example: name });
}

async function loadExamples() {
  const list = await api.examples();
  const button = (example) => {
    const choose = async (event) => {
      const pressed = event.currentTarget;
      await exampleImage(example.name);
      $("#question").value = example.question;
      form.setAnswers(example.responses.map((text) => [text]));
      await score(pressed);
    };
    const picture = h("img", { src: `page/examples/${example.name}.png`, alt: "", width: "96", height: "96" });
    const caption = h("span", { class: "caption" }, example.name);
    return h("button", { type: "button", title: example.question, onclick: choose }, picture, caption);
  };
  $("#examples .thumbs").replaceChildren(...list.map(button));
  $("#examples").hidden = false;
  return list;
}

async function restore(wanted, examples) {
  $("#question").value = wanted.question;
  form.setAnswers(wanted.responses.map((text) => [text]));
  for (const [select, model] of [
    ["#teacher", wanted.teacher],
    ["#other", wanted.other],
  ])
    if (known.teachers.some((each) => each.model === model)) $(select).value = model;
  form.fillDegradations(known.teachers, wanted.degradation || "pixelate");
  if (wanted.strength > 0 && wanted.strength <= 1) $("#strength").value = wanted.strength;
  form.settleStrength();
  if (wanted.dataUrls.length) form.setImages(wanted.dataUrls.map((dataUrl) => ({ dataUrl, name: "image from the link" })));
  else if (examples.some((each) => each.name === wanted.example)) await exampleImage(wanted.example);
  else if (wanted.imagesLeftOut) return; // the user has to choose it again
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
  on("#file", "change", (event) => take(event.target.files));
  on("#more", "change", (event) => take(event.target.files, { add: true }));
  on("#key", "change", (event) => {
    api.setKey(event.target.value);
    load();
  });
  on("#other", "change", again);
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
  for (const [button, choose] of [
    ["#as-text", () => heatmap.arrange(false)],
    ["#as-tokens", () => heatmap.arrange(true)],
    ["#by-va", () => heatmap.colourBy(false)],
    ["#by-divergence", () => heatmap.colourBy(true)],
  ])
    on(button, "click", () => {
      choose();
      heatmap.draw(last);
    });
  on("#copy-link", "click", copyLink);
  on("#save-json", "click", saveJson);
  on("#save-png", "click", () => savePng(last));
  on("#theme", "click", otherTheme);
  listenForFiles();
  views.listen();
  details.listen(findRegions);
}

/** Takes images that are dropped anywhere, or pasted. */
function listenForFiles() {
  const over = (now) => (event) => {
    event.preventDefault();
    $("#drop").classList.toggle("over", now);
  };
  for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, over(true));
  for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, over(false));
  document.addEventListener("drop", (event) => take(event.dataTransfer.files));
  document.addEventListener("paste", (event) => {
    const { files } = event.clipboardData;
    if (!files.length) return;
    event.preventDefault();
    take(files);
  });
}

setTheme(recall("localStorage", "vaopd.theme"));
$("#key").value = api.getKey();
form.setAnswers([]);
form.fillTeachers([]);
views.showAs(phone.matches ? "slider" : "pair");
listen();
const [examples] = await Promise.all([loadExamples().catch(() => []), load()]);
const wanted = link.read();
if (wanted) await restore(wanted, examples);
document.documentElement.dataset.ready = "true";
