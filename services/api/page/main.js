// The page: reads the form, asks the API, draws what it says. State lives in the form, in `image` and in `last`.
import * as api from "./api.js";
import * as charts from "./charts.js";
import { $, h, save } from "./dom.js";
import * as heatmap from "./heatmap.js";
import * as link from "./link.js";
import { savePng } from "./picture.js";

const NAMES = { pixelate: "pixelated", blur: "blurred", mean_colour: "mean colour", black: "black", noise: "noise" };
const WITH_STRENGTH = ["pixelate", "blur"];
const ALTERNATIVES = 6;
const LOOK_AGAIN_MS = 3000;

let image = null; // { dataUrl, name, example? }
let last = null; // { view, reply, labels } on show
let known = { teachers: [], student: null };
let scoring = null; // AbortController of the question under way
let degrading = null;

// ---------------------------------------------------------------------------------------------- the form

function setImage(next) {
  image = next;
  $("#chosen").hidden = !next;
  if (next) {
    $("#chosen img").src = next.dataUrl;
    $("#chosen span").textContent = next.name;
  } else $("#file").value = "";
}

async function takeFile(file) {
  if (!file) return;
  if (!/^image\/(png|jpeg|webp)$/.test(file.type)) {
    return showError(new api.Problem(415, `${file.name || "This"} is ${file.type ? `of type ${file.type}` : "of an unknown type"}; choose a PNG, JPEG or WEBP image`, "image"));
  }
  clearError();
  const dataUrl = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  setImage({ dataUrl, name: file.name || "pasted image" });
}

function answerField(text = "", ids = null, from = null) {
  const number = $("#responses .list").childElementCount + 1;
  const area = h("textarea", { rows: "2", "aria-label": `Response ${number}` });
  area.value = text;
  const hint = from && h("p", { class: "hint" }, `sampled by ${from}`);
  const box = h("div", { class: "answer" }, area, h("button", { type: "button", class: "quiet", "aria-label": `Remove response ${number}`, onclick: () => {
    box.remove();
    if (!$("#responses .list").childElementCount) addAnswer();
    renumber();
  } }, "✕"), hint);
  // Token ids hold as long as nobody edits what they say.
  area.addEventListener("input", () => { box.ids = null; hint?.remove(); });
  box.ids = ids;
  return box;
}

function renumber() {
  [...$("#responses .list").children].forEach((box, index) => {
    $("textarea", box).setAttribute("aria-label", `Response ${index + 1}`);
    $("button", box).setAttribute("aria-label", `Remove response ${index + 1}`);
  });
}

const addAnswer = (...given) => $("#responses .list").append(answerField(...given));

function setAnswers(list) {
  $("#responses .list").replaceChildren();
  for (const item of list.length ? list : [[""]]) addAnswer(...item);
}

function readView() {
  return {
    image, question: $("#question").value.trim(), degradation: $("#degradation").value, strength: Number($("#strength").value), teacher: $("#teacher").value,
    responses: [...$("#responses .list").children].map((box) => $("textarea", box).value),
  };
}

function body(view) {
  const boxes = [...$("#responses .list").children];
  const sameTokens = known.student?.tokenizer_fingerprint === known.teachers.find((each) => each.model === view.teacher)?.tokenizer_fingerprint;
  return {
    question: view.question, ...(view.image && { image: view.image.dataUrl }), ...(view.teacher && { teacher: view.teacher }),
    responses: view.responses.map((text, k) => (sameTokens && boxes[k].ids) || text), degradation: { kind: view.degradation, strength: view.strength }, top_k: ALTERNATIVES,
  };
}

// ---------------------------------------------------------------------------------------------- asking

async function score({ quietly = false } = {}) {
  const view = readView();
  const missing = !view.question ? ["question", "Type a question"] : view.responses.some((text) => !text.trim()) ? [`responses.${view.responses.findIndex((text) => !text.trim())}`, "Type a response, or remove the empty one"] : null;
  if (missing) return showError(new api.Problem(422, missing[1], missing[0]));
  clearError();
  scoring?.abort();
  scoring = new AbortController();
  const mine = scoring;
  busy(true, "Scoring…");
  const started = performance.now();
  try {
    const [reply] = await Promise.all([api.score(body(view), mine.signal), showViews(view, mine.signal)]);
    const labels = reply.rollouts.map((_, k) => (reply.rollouts.length > 1 ? `Response ${k + 1}` : "The response"));
    last = { view, reply, labels };
    draw((performance.now() - started) / 1000, quietly);
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  } finally {
    if (mine === scoring) busy(false);
  }
}

function draw(seconds, quietly) {
  const { view, reply, labels } = last;
  $("#welcome").hidden = true;
  $("#result").hidden = false;
  charts.drawFigures(reply, seconds);
  heatmap.draw(reply, labels);
  charts.drawHistogram(reply);
  charts.drawTables(reply, labels);
  $("#status").textContent = charts.summary(reply);
  $("#link-hint").textContent = link.write(view) ? "The address of this page holds the whole view." : "The address of this page holds question, responses and settings; the image is too large for it and has to be chosen again.";
  if (!quietly && matchMedia("(max-width: 760px)").matches) $("#result").scrollIntoView();
}

async function showViews(view, signal) {
  $("section[aria-labelledby=views-title]").hidden = !view.image;
  if (!view.image) return;
  const png = await api.degraded({ image: view.image.dataUrl, degradation: { kind: view.degradation, strength: view.strength } }, signal);
  const [original, degraded] = [$("#original"), $("#degraded")];
  if (degraded.src) URL.revokeObjectURL(degraded.src);
  original.src = view.image.dataUrl;
  degraded.src = URL.createObjectURL(png);
  degraded.alt = `The degraded view: ${NAMES[view.degradation] ?? view.degradation}${WITH_STRENGTH.includes(view.degradation) ? ` ${view.strength}` : ""}`;
  await Promise.all([original.decode(), degraded.decode()]);
  $("#compare").classList.toggle("small", original.naturalWidth < 300);
}

async function sample() {
  const question = $("#question").value.trim();
  if (!question) return showError(new api.Problem(422, "Type a question", "question"));
  clearError();
  busy(true, "The student answers…");
  try {
    const answer = await api.sample({ question, ...(image && { image: image.dataUrl }), num_responses: Number($("#count").value), seed: Math.floor(Math.random() * 2 ** 31) });
    setAnswers(answer.responses.map((response) => [response.text, response.token_ids, answer.model]));
  } catch (error) {
    busy(false);
    return showError(error);
  }
  return score();
}

function busy(now, words = "") {
  $("#score").disabled = $("#sample").disabled = now;
  $("#score").textContent = now ? words : "Score";
  $("#result").setAttribute("aria-busy", String(now));
}

function showError(problem) {
  const known = problem instanceof api.Problem;
  if (!known) console.error(problem);
  $("#error").replaceChildren(h("b", {}, known ? api.inWords(problem) : "The page failed unexpectedly; reload it."), problem.requestId ? h("div", { class: "hint" }, `Request ${problem.requestId}`) : "");
  $("#error").hidden = false;
  if ([401, 403].includes(problem.status)) $("#key-field").hidden = false;
  const index = /^responses?(?:\.(\d+))?/.exec(problem.field ?? "");
  const at = { question: $("#question"), image: $("#drop"), "degradation.strength": $("#strength") }[problem.field] ?? (index && $("textarea", $("#responses .list").children[Number(index[1] ?? 0)] ?? document));
  at?.setAttribute("aria-invalid", "true");
  $("#error").scrollIntoView({ block: "nearest" });
}

function clearError() {
  $("#error").hidden = true;
  document.querySelectorAll("[aria-invalid]").forEach((element) => element.removeAttribute("aria-invalid"));
}

// ---------------------------------------------------------------------------------------------- at the start

async function loadTeachers() {
  try {
    known.teachers = await api.teachers();
    known.student = (await api.students())[0] ?? null;
  } catch (error) {
    if (error.status === 503) setTimeout(loadTeachers, LOOK_AGAIN_MS); // a teacher that is loading will be there soon
    return showError(error);
  }
  clearError();
  const chosen = $("#teacher").value;
  $("#teacher").replaceChildren(...known.teachers.map((each) => h("option", { selected: each.model === chosen }, each.model)));
  $("#sampling").hidden = !known.student;
  if (known.student) $("#sample").title = known.student.model;
  fillDegradations();
}

function fillDegradations() {
  const kinds = known.teachers.find((each) => each.model === $("#teacher").value)?.degradations ?? Object.keys(NAMES);
  const chosen = $("#degradation").value || "pixelate";
  $("#degradation").replaceChildren(...kinds.map((kind) => h("option", { value: kind, selected: kind === chosen }, NAMES[kind] ?? kind.replaceAll("_", " "))));
  settleStrength();
}

function settleStrength() {
  $("#strength").disabled = !WITH_STRENGTH.includes($("#degradation").value);
  $("#strength-value").textContent = $("#strength").disabled ? "unused" : Number($("#strength").value).toFixed(2);
}

async function exampleImage(name) {
  const blob = await (await fetch(`page/examples/${name}.png`)).blob();
  await takeFile(new File([blob], `${name}.png`, { type: "image/png" }));
  image.example = name;
}

async function loadExamples() {
  const list = await api.examples();
  $("#examples .thumbs").replaceChildren(...list.map((each) => h("button", { type: "button", title: each.question, onclick: async () => {
    await exampleImage(each.name);
    $("#question").value = each.question;
    setAnswers(each.responses.map((text) => [text]));
    await score();
  } }, h("img", { src: `page/examples/${each.name}.png`, alt: "", width: "96", height: "96" }), each.name)));
  $("#examples").hidden = false;
  return list;
}

async function restore(wanted, examples) {
  $("#question").value = wanted.question;
  setAnswers(wanted.responses.map((text) => [text]));
  if (known.teachers.some((each) => each.model === wanted.teacher)) $("#teacher").value = wanted.teacher;
  fillDegradations();
  if ([...$("#degradation").options].some((option) => option.value === wanted.degradation)) $("#degradation").value = wanted.degradation;
  if (wanted.strength > 0 && wanted.strength <= 1) $("#strength").value = wanted.strength;
  settleStrength();
  if (wanted.dataUrl) setImage({ dataUrl: wanted.dataUrl, name: "image of the link" });
  else if (examples.some((each) => each.name === wanted.example)) await exampleImage(wanted.example);
  else if (wanted.example === null) return; // its image was too large for the link: the user chooses it
  await score();
}

function listen() {
  $("#form").addEventListener("submit", (event) => { event.preventDefault(); score(); });
  $("#add").addEventListener("click", () => { addAnswer(); $("#responses .list").lastElementChild.firstElementChild.focus(); });
  $("#sample").addEventListener("click", sample);
  $("#file").addEventListener("change", (event) => takeFile(event.target.files[0]));
  $("#clear-image").addEventListener("click", () => { setImage(null); $("#file").focus(); });
  $("#key").value = api.getKey();
  $("#key").addEventListener("change", (event) => { api.setKey(event.target.value); loadTeachers(); });
  $("#teacher").addEventListener("change", () => { fillDegradations(); again(); });
  $("#degradation").addEventListener("change", () => { settleStrength(); again(); });
  $("#strength").addEventListener("input", () => { settleStrength(); preview(); });
  $("#strength").addEventListener("change", again);
  for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => { event.preventDefault(); $("#drop").classList.add("over"); });
  for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, (event) => { event.preventDefault(); $("#drop").classList.remove("over"); });
  document.addEventListener("drop", (event) => takeFile(event.dataTransfer.files[0]));
  document.addEventListener("paste", (event) => { const file = [...event.clipboardData.files][0]; if (file) { event.preventDefault(); takeFile(file); } });
  $("#split").addEventListener("input", (event) => $("#compare").style.setProperty("--shown", `${100 - event.target.value}%`));
  $("#as-slider").addEventListener("click", () => showAs("slider"));
  $("#as-pair").addEventListener("click", () => showAs("pair"));
  $("#copy-link").addEventListener("click", copyLink);
  $("#save-json").addEventListener("click", () => save(new Blob([JSON.stringify({ ...last.view, image: last.view.image?.name ?? null, ...last.reply }, null, 1)], { type: "application/json" }), "visual-advantage.json"));
  $("#save-png").addEventListener("click", () => savePng(last.view, last.reply, last.labels));
  $("#theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" || (!document.documentElement.dataset.theme && systemDark()) ? "light" : "dark"));
}

/** What is on show follows its settings. */
function again() {
  if (last) score({ quietly: true });
}

function preview() {
  if (!last?.view.image) return;
  degrading?.abort();
  degrading = new AbortController();
  showViews({ ...last.view, degradation: $("#degradation").value, strength: Number($("#strength").value) }, degrading.signal).catch((error) => {
    if (error.name !== "AbortError") showError(error);
  });
}

function showAs(kind) {
  $("#compare").className = `${$("#compare").classList.contains("small") ? "small " : ""}compare ${kind}-view`;
  $("#as-slider").setAttribute("aria-pressed", String(kind === "slider"));
  $("#as-pair").setAttribute("aria-pressed", String(kind === "pair"));
}

async function copyLink() {
  link.write(last.view);
  try {
    await navigator.clipboard.writeText(location.href);
    $("#link-hint").textContent = "The link is copied.";
  } catch {
    $("#link-hint").textContent = "The browser lets nothing be copied here; take the link from the address bar.";
  }
  $("#status").textContent = $("#link-hint").textContent;
}

const systemDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

function setTheme(theme) {
  if (theme) {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("vaopd.theme", theme);
  }
  $("#theme").setAttribute("aria-pressed", String(theme ? theme === "dark" : systemDark()));
}

setTheme(localStorage.getItem("vaopd.theme"));
setAnswers([]);
showAs(matchMedia("(max-width: 760px)").matches ? "slider" : "pair");
listen();
settleStrength();
const [examples] = await Promise.all([loadExamples().catch(() => []), loadTeachers()]);
const wanted = link.read();
if (wanted) await restore(wanted, examples);
document.documentElement.dataset.ready = "true";
