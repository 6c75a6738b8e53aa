// Writes the view into the fragment of the page's address, which browsers don't send to the server.

const TINY_CHARACTERS = 8_000; // images of up to this many characters of base64, together, are included

export function write(view) {
  const parts = new URLSearchParams({
    q: view.question,
    d: view.degradation,
    s: String(view.strength),
    t: view.teacher,
  });
  if (view.other) parts.set("o", view.other);
  for (const response of view.responses) parts.append("r", response);
  const { images } = view;
  const example = images.length === 1 && images[0].example;
  const tiny = images.reduce((sum, image) => sum + image.dataUrl.length, 0) <= TINY_CHARACTERS;
  if (example) parts.set("x", example);
  else if (tiny) images.forEach((image) => parts.append("i", image.dataUrl));
  else parts.set("n", "1"); // images were left out
  history.replaceState(null, "", `#${parts}`);
  return Boolean(example || tiny);
}

/** Returns the view of the fragment, or null where there is none. */
export function read() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (!parts.has("q")) return null;
  return {
    question: parts.get("q"),
    responses: parts.getAll("r"),
    degradation: parts.get("d"),
    strength: Number(parts.get("s")),
    teacher: parts.get("t"),
    other: parts.get("o") ?? "",
    example: parts.get("x"),
    imagesLeftOut: parts.has("n"),
    dataUrls: parts.getAll("i").filter((url) => url.startsWith("data:image/")),
  };
}
