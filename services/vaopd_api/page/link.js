// Writes the view into the fragment of the page's address, which browsers don't send to the server.

const TINY_CHARACTERS = 8_000; // images of up to this many characters of base64 are included

export function write(view) {
  const parts = new URLSearchParams({
    q: view.question,
    d: view.degradation,
    s: String(view.strength),
    t: view.teacher,
  });
  for (const response of view.responses) parts.append("r", response);
  let complete = true;
  if (view.image?.example) parts.set("x", view.image.example);
  else if (view.image && view.image.dataUrl.length <= TINY_CHARACTERS) parts.set("i", view.image.dataUrl);
  else if (view.image) {
    parts.set("n", "1"); // an image was left out
    complete = false;
  }
  history.replaceState(null, "", `#${parts}`);
  return complete;
}

/** Returns the view of the fragment, or null where there is none. */
export function read() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (!parts.has("q")) return null;
  const image = parts.get("i");
  return {
    question: parts.get("q"),
    responses: parts.getAll("r"),
    degradation: parts.get("d"),
    strength: Number(parts.get("s")),
    teacher: parts.get("t"),
    example: parts.get("x"),
    imageLeftOut: parts.has("n"),
    dataUrl: image?.startsWith("data:image/") ? image : null,
  };
}
