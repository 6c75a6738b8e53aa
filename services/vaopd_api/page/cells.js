// Cells: what is shown and selected as one. A letter outside the vocabulary is several tokens, whose
// texts are "\ufffd"; they become one cell.

const EXPONENT = 0.5; // colour grows with the root of a score, so that small values show
const PART = "\ufffd";

/**
 * Returns a response's cells, each { from, to, text }: tokens `from` to `to` − 1, mostly one. `written`: the response as
 * text, which says what neighbouring parts are together.
 */
export function makeCells(tokens, written) {
  const cells = [];
  let at = 0; // place in `written`
  for (let from = 0; from < tokens.length; ) {
    let to = from + 1;
    const { text } = tokens[from];
    if (text.includes(PART)) {
      while (tokens[to]?.text.includes(PART)) to += 1;
      const next = to < tokens.length ? written.indexOf(tokens[to].text, at) : -1;
      const together = written.slice(at, next < 0 ? written.length : next);
      at += together.length;
      cells.push(...splitLetters(together || text, from, to));
    } else {
      if (written.startsWith(text, at)) at += text.length;
      cells.push({ from, to, text });
    }
    from = to;
  }
  return cells;
}

/** Returns a cell for each letter where each token is one byte; else one for all, as the borders aren't known. */
function splitLetters(text, from, to) {
  const letters = [...text];
  const bytes = letters.map((letter) => new TextEncoder().encode(letter).length);
  if (bytes.reduce((total, count) => total + count, 0) !== to - from) return [{ from, to, text }];
  let at = from;
  return letters.map((letter, index) => ({ from: at, to: (at += bytes[index]), text: letter }));
}

/** Returns the sum of a cell's values: the log-prob of a letter is the sum of its tokens'. */
export const sum = (values, { from, to }) => values.slice(from, to).reduce((total, value) => total + value, 0);

/** Returns the strength of a score's colour, in per cent of that of `scale`. */
export const amount = (score, scale) => `${(100 * (Math.max(score, 0) / scale) ** EXPONENT).toFixed(1)}%`;
