// The form. The state is in its fields, and in `image`.
import { $, h } from "./dom.js";
import { Problem } from "./api.js";

const ALTERNATIVES = 6;
const COLUMNS = ["view_divergence_nats"]; // asked for where the teacher computes them

let images = []; // of { dataUrl, name, example? }
let strengths = {}; // of the chosen teacher: kind of degradation -> what its strength means
const answers = () => [...$("#responses .list").children];
const inWords = (kind) => kind.replaceAll("_", " ");

/** Names the degraded view for people, e.g. "blur 0.05". */
export const viewName = ({ degradation, strength }) =>
  inWords(degradation) + (degradation in strengths ? ` ${strength}` : "");

export function setImages(list) {
  images = list;
  for (const input of [$("#file"), $("#more")]) input.value = ""; // it would name files that are not shown
  $("#add-image").hidden = !list.length;
  $("#chosen").replaceChildren(
    ...list.map((image, index) => {
      const remove = () => {
        setImages(images.filter((other) => other !== image));
        $("#file").focus();
      };
      const label = `Remove ${image.name}`;
      return h(
        "li",
        {},
        h("img", { src: image.dataUrl, alt: "", width: "40", height: "40" }),
        h("span", {}, list.length > 1 ? `${index + 1}: ${image.name}` : image.name),
        h("button", { type: "button", class: "quiet", "aria-label": label, onclick: remove }, "✕"),
      );
    }),
  );
}

/**
 * Takes files as the images, or with `add` as further ones. Throws a Problem for other types. `example`: the name, if it
 * is one of the page's.
 */
export async function takeFiles(files, { add = false, example } = {}) {
  const taken = await Promise.all([...files].map((file) => readFile(file, example)));
  if (taken.length) setImages(add ? [...images, ...taken] : taken);
}

async function readFile(file, example) {
  if (!/^image\/(png|jpeg|webp)$/.test(file.type)) {
    const kind = file.type ? `of type ${file.type}` : "of an unknown type";
    throw new Problem(415, `${file.name || "This"} is ${kind}; choose a PNG, JPEG or WEBP image`, "image");
  }
  const dataUrl = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem(0, `${file.name} can't be read; choose it again`, "image"));
    reader.readAsDataURL(file);
  });
  return { dataUrl, name: file.name || "pasted image", example };
}

/** Adds a response. `ids`: the tokens that a student sampled, valid until the text is edited; `by`: its whole reply. */
export function addAnswer(text = "", ids = null, by = null) {
  const area = h("textarea", { rows: "2", dir: "auto" });
  area.value = text;
  const hint = by && h("p", { class: "hint" }, `sampled by ${by.model}`);
  const remove = h("button", { type: "button", class: "quiet" }, "✕");
  const box = h("div", { class: "answer" }, area, remove, hint);
  Object.assign(box, { ids, student: by?.model, vocabulary: by?.tokenizer_fingerprint });
  area.addEventListener("input", () => {
    box.ids = null;
    hint?.remove();
  });
  remove.addEventListener("click", () => {
    box.remove();
    if (!answers().length) addAnswer();
    number();
    $("#add").focus();
  });
  $("#responses .list").append(box);
  number();
  return area;
}

function number() {
  answers().forEach((box, index) => {
    $("textarea", box).setAttribute("aria-label", `Response ${index + 1}`);
    $("button", box).setAttribute("aria-label", `Remove response ${index + 1}`);
  });
}

/** Each item: the arguments of `addAnswer`. */
export function setAnswers(list) {
  $("#responses .list").replaceChildren();
  for (const item of list.length ? list : [[""]]) addAnswer(...item);
}

export function readView() {
  return {
    images,
    question: $("#question").value.trim(),
    responses: answers().map((box) => $("textarea", box).value),
    by: answers().map((box) => (box.ids ? box.student : null)),
    degradation: $("#degradation").value,
    strength: Number($("#strength").value),
    teacher: $("#teacher").value,
    other: $("#other").value,
  };
}

/** Returns a Problem that names what is missing in the form, or null. */
export function findMissing(view) {
  if (!view.question) return new Problem(422, "Type a question", "question");
  const empty = view.responses.findIndex((text) => !text.trim());
  return empty < 0 ? null : new Problem(422, "Type a response, or remove the empty one", `responses.${empty}`);
}

/** Returns the keys of a request that say what is asked. */
export const promptOf = (view) => ({ question: view.question, images: view.images.map((image) => image.dataUrl) });

/** Returns the body of a request to score with the teacher `model`; with sampled token ids if it has the same tokens. */
export function requestBody(view, known, model) {
  const teacher = known.teachers.find((each) => each.model === model);
  const idsOf = (box) => (box.vocabulary === teacher?.tokenizer_fingerprint ? box.ids : null);
  const boxes = answers();
  return {
    ...promptOf(view),
    ...(model && { teacher: model }),
    responses: view.responses.map((text, k) => idsOf(boxes[k]) ?? text),
    degradation: { kind: view.degradation, strength: view.strength },
    top_k: ALTERNATIVES,
    columns: COLUMNS.filter((name) => teacher?.columns.includes(name)),
  };
}

export function fillTeachers(teachers) {
  const fill = (select, models) => {
    const chosen = select.value;
    select.replaceChildren(...models.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
  };
  const models = teachers.map(({ model }) => [model, model]);
  fill($("#teacher"), teachers.length ? models : [["", "none answers yet"]]);
  fill($("#other"), [["", "none"], ...models]);
  $("#other-field").hidden = teachers.length < 2;
  fillDegradations(teachers);
}

/** Lists the chosen teacher's degradations; until a teacher answers, only the one that is `wanted`. */
export function fillDegradations(teachers, wanted = $("#degradation").value || "pixelate") {
  const teacher = teachers.find((each) => each.model === $("#teacher").value);
  strengths = teacher?.strengths ?? {};
  const option = (kind) => h("option", { value: kind, selected: kind === wanted }, inWords(kind));
  $("#degradation").replaceChildren(...(teacher?.degradations ?? [wanted]).map(option));
  settleStrength();
}

/** Shows the strength, or that the chosen degradation has none. */
export function settleStrength() {
  const meaning = strengths[$("#degradation").value];
  $("#strength").disabled = !meaning;
  $("#strength").title = meaning ?? "";
  $("#strength-value").textContent = meaning ? Number($("#strength").value).toFixed(2) : "unused";
}

/** Marks the field that caused a problem, by the API's name for it. */
export function mark(field) {
  const response = /^response(?:s\.(\d+)|_token_ids)?/.exec(field ?? "");
  const place = field?.startsWith("image")
    ? $("#drop")
    : { question: $("#question"), "degradation.strength": $("#strength"), "degradation.kind": $("#degradation") }[
        field
      ];
  const at = place ?? (response && $("textarea", answers()[Number(response[1] ?? 0)]));
  at?.setAttribute("aria-invalid", "true");
}

export function unmark() {
  document.querySelectorAll("[aria-invalid]").forEach((element) => element.removeAttribute("aria-invalid"));
}
