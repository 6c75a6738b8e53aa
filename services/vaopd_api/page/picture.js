// Saves the heat map as a PNG: draws what the page shows on a canvas.
import { $, percent, save } from "./dom.js";
import { viewName } from "./form.js";

const WIDTH = 1200,
  MARGIN = 32,
  SCALE = 2,
  LINE = 36,
  PICTURE = 220;

export async function savePng({ view, replies }) {
  const measure = document.createElement("canvas").getContext("2d");
  const blocks = plan(measure, view, replies);
  const height = blocks.at(-1).bottom + MARGIN;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [WIDTH * SCALE, height * SCALE];
  const pen = canvas.getContext("2d");
  pen.scale(SCALE, SCALE);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => resolveColour(`var(${name})`);
  pen.fillStyle = colour("--card");
  pen.fillRect(0, 0, WIDTH, height);
  pen.textBaseline = "middle";
  for (const block of blocks) block.paint(pen, colour, style);
  canvas.toBlob((blob) => save(blob, "visual-advantage.png"), "image/png");
}

/** Returns a CSS colour as the canvas understands it, with light-dark() and color-mix() evaluated. */
function resolveColour(css) {
  const probe = $("#details");
  const before = probe.style.color;
  probe.style.color = css;
  const value = getComputedStyle(probe).color;
  probe.style.color = before;
  return value;
}

const UI = "system-ui, sans-serif",
  MONO = "ui-monospace, 'DejaVu Sans Mono', monospace";

function plan(measure, view, replies) {
  const blocks = [];
  let y = MARGIN;
  const add = (height, paint) => {
    const top = y;
    y += height;
    blocks.push({ bottom: y, paint: (pen, colour) => paint(pen, colour, top) });
  };
  const text = (words, font, name, height) => {
    for (const line of wrapped(measure, words, font)) {
      add(height, (pen, colour, top) => {
        pen.font = font;
        pen.fillStyle = colour(name);
        pen.fillText(line, MARGIN, top + height / 2);
      });
    }
  };
  text(view.question, `600 22px ${UI}`, "--ink", 34);
  for (const reply of replies) {
    text(
      `${reply.model} · degraded view: ${viewName(view)} · the top 10 % of tokens carry ` +
        `${percent(reply.share_of_top_10)} of VA, the top 20 % ${percent(reply.share_of_top_20)}`,
      `14px ${UI}`,
      "--muted",
      28,
    );
  }
  for (const pair of document.querySelectorAll("#compare .two")) {
    add(PICTURE + 20, (pen, _, top) => {
      const images = [...pair.querySelectorAll("img")];
      pen.imageSmoothingEnabled = images[0].naturalWidth > PICTURE;
      images.forEach((image, index) => {
        const ratio = PICTURE / Math.max(image.naturalWidth, image.naturalHeight);
        const [width, height] = [image.naturalWidth * ratio, image.naturalHeight * ratio];
        pen.drawImage(image, MARGIN + index * (PICTURE + 20), top + 6, width, height);
      });
    });
  }
  document.querySelectorAll("#rollouts .version").forEach((version) => {
    const name = $(".tokens", version).getAttribute("aria-label").replace("Tokens of ", "");
    const weight = $(".weight", version)?.textContent;
    const heading = [name, weight, $(".facts", version).textContent].filter(Boolean).join(" · ");
    text(heading, `600 15px ${UI}`, "--ink", 36);
    const lines = tokenLines(measure, $(".tokens", version));
    add(lines.length * LINE + 8, (pen, colour, top) =>
      lines.forEach((line, row) => line.forEach((item) => paintToken(pen, colour, item, top + row * LINE))),
    );
  });
  return blocks;
}

function wrapped(measure, words, font) {
  measure.font = font;
  const lines = [""];
  for (const word of words.split(/\s+/)) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (measure.measureText(longer).width > WIDTH - 2 * MARGIN && lines.at(-1)) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}

function tokenLines(measure, tokens) {
  measure.font = `16px ${MONO}`;
  const lines = [[]];
  let x = MARGIN;
  for (const button of tokens.querySelectorAll(".token")) {
    const width = Math.max(24, measure.measureText(button.textContent).width + 10);
    if (x + width > WIDTH - MARGIN) {
      lines.push([]);
      x = MARGIN;
    }
    lines.at(-1).push({ button, x, width });
    x += width + 3;
  }
  return lines;
}

function paintToken(pen, colour, { button, x, width }, top) {
  pen.beginPath();
  pen.roundRect(x, top + 3, width, LINE - 6, 5);
  pen.fillStyle = getComputedStyle(button).backgroundColor;
  pen.fill();
  if (button.classList.contains("high")) {
    pen.lineWidth = 2;
    pen.strokeStyle = colour("--high");
    pen.stroke();
  }
  pen.font = `16px ${MONO}`;
  pen.fillStyle = button.classList.contains("against") ? colour("--against") : colour("--ink");
  pen.fillText(button.textContent, x + 5, top + LINE / 2 + 1);
  if (button.classList.contains("against")) pen.fillRect(x + 5, top + LINE - 9, width - 10, 1.5);
}
