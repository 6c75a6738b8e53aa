// Shows each image in both views, side by side or under a slider.
import * as api from "./api.js";
import { $, h } from "./dom.js";
import { viewName } from "./form.js";

const SMALL_PX = 300; // pixels of smaller images are shown as squares

/** Asks for the degraded view of each image. */
export function load({ images, degradation, strength }, signal) {
  const settings = { kind: degradation, strength };
  return Promise.all(images.map((image) => api.degraded({ image: image.dataUrl, degradation: settings }, signal)));
}

/** Shows the images of a view with their degraded views, as `load` returned them. */
export async function show(view, degraded) {
  $("#views").hidden = !view.images.length;
  document.querySelectorAll("#compare .degraded").forEach((image) => URL.revokeObjectURL(image.src));
  const name = `degraded view: ${viewName(view)}`;
  const figure = (kind, src, alt, caption) =>
    h("figure", {}, h("div", { class: "frame" }, h("img", { class: kind, src, alt })), h("figcaption", {}, caption));
  const pairs = view.images.map((image, index) => {
    const which = view.images.length > 1 ? ` ${index + 1}` : "";
    return h(
      "div",
      { class: "two" },
      figure("original", image.dataUrl, `The original image${which}`, `original${which}`),
      figure("degraded", URL.createObjectURL(degraded[index]), `The ${name}${which && `, image${which}`}`, "degraded"),
    );
  });
  await Promise.all(pairs.flatMap((pair) => [...pair.querySelectorAll("img")]).map((image) => image.decode()));
  for (const pair of pairs) pair.classList.toggle("small", $(".original", pair).naturalWidth < SMALL_PX);
  $("#compare").replaceChildren(...pairs);
}

/** `kind`: "pair" or "slider". */
export function showAs(kind) {
  $("#compare").classList.toggle("slider-view", kind === "slider");
  $("#as-pair").setAttribute("aria-pressed", String(kind === "pair"));
  $("#as-slider").setAttribute("aria-pressed", String(kind === "slider"));
}

export function listen() {
  $("#as-pair").addEventListener("click", () => showAs("pair"));
  $("#as-slider").addEventListener("click", () => showAs("slider"));
  const slide = (event) => $("#compare").style.setProperty("--shown", `${100 - event.target.value}%`);
  $("#split").addEventListener("input", slide);
}
