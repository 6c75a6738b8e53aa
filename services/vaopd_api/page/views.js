// Shows the original and the degraded image, side by side or under a slider.
import * as api from "./api.js";
import { $ } from "./dom.js";
import { viewName } from "./form.js";

const SMALL_PX = 300; // pixels of smaller images are shown as squares

export async function show(view, signal) {
  $("#views").hidden = !view.image;
  if (!view.image) return;
  const degradation = { kind: view.degradation, strength: view.strength };
  const png = await api.degraded({ image: view.image.dataUrl, degradation }, signal);
  const [original, degraded] = [$("#original"), $("#degraded")];
  if (degraded.src) URL.revokeObjectURL(degraded.src);
  original.src = view.image.dataUrl;
  degraded.src = URL.createObjectURL(png);
  degraded.alt = `The degraded view: ${viewName(view)}`;
  await Promise.all([original.decode(), degraded.decode()]);
  $("#compare").classList.toggle("small", original.naturalWidth < SMALL_PX);
}

/** `kind`: "pair" or "slider". */
export function showAs(kind) {
  $("#compare").classList.toggle("pair-view", kind === "pair");
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
