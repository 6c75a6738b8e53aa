"""A score for people: coloured tokens and a histogram in the terminal, a PNG, a self-contained HTML file. Torch-free.

Colour means VA: none at 0, full at the group's largest (at least 1 nat), growing with the root so that small values
show. The high group is underlined or outlined; where seeing speaks against a token, it is red.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vaopd.http_types import RolloutScore, ScoreReply

EDGES_NATS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, float("inf"))
AGAINST_NATS = 1.0
"""From there on the degraded view predicts a token better: the picture speaks against it."""
RAMP = (230, 229, 222, 221, 215, 214, 208)
"""Of the 256 colours that every terminal has, from pale to orange; black is readable on each."""
BAR_CELLS = 20
BAR_NATS_PER_CELL = 0.25
HEAT, OUTLINE, AGAINST, INK, MUTED = (255, 171, 26), (18, 58, 134), (179, 38, 30), (27, 28, 31), (90, 91, 96)


@dataclass(frozen=True, kw_only=True)
class Views:
    """One image in both views."""

    original: Image.Image
    degraded: Image.Image


def percent(share: float) -> str:
    """Says "all" only of all.

    >>> percent(0.99996), percent(1.0), percent(0.0731)
    ('> 99.9 %', '100.0 %', '7.3 %')
    """
    return "> 99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def fractions(reply: ScoreReply) -> list[list[float]]:
    """How full each token's colour is, 0 to 1, per rollout."""
    scale = max(1.0, *(max(rollout.visual_advantage) for rollout in reply.rollouts))
    return [[(va / scale) ** 0.5 for va in rollout.visual_advantage] for rollout in reply.rollouts]


def summary(reply: ScoreReply) -> str:
    tokens = sum(len(rollout.tokens) for rollout in reply.rollouts)
    if reply.share_of_top_10 is None or reply.share_of_top_20 is None:
        return f"Seeing the image helps with none of the {tokens} tokens."
    return (
        f"Of {tokens} tokens the top 10 % carry {percent(reply.share_of_top_10)} of the visual advantage, "
        f"the top 20 % carry {percent(reply.share_of_top_20)}."
    )


def heading(reply: ScoreReply, k: int) -> str:
    rollout = reply.rollouts[k]
    weight = f"weight {rollout.rollout_weight:.3f}, " if len(reply.rollouts) > 1 else ""
    return f"Response {k + 1}: {weight}mean VA {rollout.mean_visual_advantage:.4f} nats per token"


def histogram(reply: ScoreReply) -> list[tuple[str, float, float]]:
    """Per range of VA: its name, the share of all tokens that lie in it, and the share of all VA that they carry."""
    va = np.concatenate([np.array(rollout.visual_advantage) for rollout in reply.rollouts])
    rows = []
    for low, high in pairwise(EDGES_NATS):
        inside = va[(va >= low) & (va < high)]
        share = float(inside.sum() / va.sum()) if va.sum() > 0 else 0.0
        rows.append(
            (f"{low:g} and more" if high == float("inf") else f"{low:g} – {high:g}", len(inside) / len(va), share)
        )
    return rows


# ------------------------------------------------------------------------------------------- terminal


def terminal_lines(reply: ScoreReply, *, colour: bool, table: bool) -> Iterator[str]:
    """Coloured running text, or a line per token; then the histogram."""
    colours = fractions(reply)
    for k, rollout in enumerate(reply.rollouts):
        yield _bold(heading(reply, k)) if colour else heading(reply, k)
        if table or not colour:
            yield from _table(rollout)
        else:
            yield "".join(_coloured(rollout, t, fraction) for t, fraction in enumerate(colours[k]))
        yield ""
    yield f"{'VA, nats':<12} {'tokens':<{BAR_CELLS + 8}} share of all VA"
    for name, tokens, share in histogram(reply):
        yield f"{name:<12} {_bar(tokens)} {percent(tokens):>7}  {_bar(share)} {percent(share):>7}"
    yield summary(reply)


def _table(rollout: RolloutScore) -> Iterator[str]:
    """A token per line: its text, both log-probs, its VA in nats, and a bar; a star stands for the high group."""
    yield f"{'token':<18} {'original':>9} {'degraded':>9} {'VA':>7}"
    columns = (rollout.tokens, rollout.teacher_logprobs, rollout.degraded_logprobs, rollout.visual_advantage)
    for token, teacher, degraded, va, high in zip(*columns, rollout.high_group, strict=True):
        bar = "█" * min(round(va / BAR_NATS_PER_CELL), BAR_CELLS)
        yield f"{token.text!r:<18} {teacher:9.3f} {degraded:9.3f} {va:7.3f} {'*' if high else ' '} {bar}".rstrip()


def _coloured(rollout: RolloutScore, t: int, fraction: float) -> str:
    codes = []
    if fraction > 1 / (2 * len(RAMP)):
        codes += ["30", f"48;5;{RAMP[min(int(fraction * len(RAMP)), len(RAMP) - 1)]}"]
    if rollout.high_group[t]:
        codes.append("4")
    if speaks_against(rollout, t):
        codes.append("31")
    # A token may hold anything, a terminal's own control sequences too.
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in rollout.tokens[t].text)
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text


def speaks_against(rollout: RolloutScore, t: int) -> bool:
    return rollout.degraded_logprobs[t] - rollout.teacher_logprobs[t] > AGAINST_NATS


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m"


def _bar(share: float) -> str:
    return ("█" * round(share * BAR_CELLS)).ljust(BAR_CELLS)


# ------------------------------------------------------------------------------------------- HTML


STYLE = """:root{color-scheme:light dark;--ink:light-dark(#1b1c1f,#ecebe6);--heat:light-dark(#ffab1a,#b4540a)}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:light-dark(#fff,#16171a)}img{image-rendering:pixelated;height:14rem;margin-right:1rem;background:#fff}
.t{font-family:ui-monospace,monospace;white-space:pre-wrap;border:2px solid transparent;border-radius:4px;
background:color-mix(in oklab,var(--heat) var(--a),transparent)}.h{border-color:light-dark(#123a86,#ffe3b8)}
.n{text-decoration:underline wavy light-dark(#b3261e,#ff9a90)}table{border-collapse:collapse}
td,th{text-align:right;padding:.1rem .8rem .1rem 0}td:first-child,th:first-child,.l{text-align:left;white-space:pre}
.b{display:inline-block;height:.7rem;background:var(--heat);margin-right:.4rem}.g .b{background:#8b8f9a}"""


def html_page(reply: ScoreReply, *, question: str, views: Sequence[Views]) -> str:
    """The whole score in one file, which asks for nothing else."""
    colours = fractions(reply)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(question[:80])}</title>',
        f"<style>{STYLE}</style><h1>{html.escape(question)}</h1>",
        f"<p>{html.escape(reply.model)}, degraded view: {reply.degradation.kind} {reply.degradation.strength:g}. ",
        f"{html.escape(summary(reply))}</p>",
    ]
    for number, view in enumerate(views, 1):
        parts.append(f'<p><img alt="Image {number}, original" src="{_data_url(view.original)}">')
        parts.append(f'<img alt="Image {number}, degraded" src="{_data_url(view.degraded)}"></p>')
    for k, rollout in enumerate(reply.rollouts):
        parts.append(f"<h2>{html.escape(heading(reply, k))}</h2><p>")
        parts += [_html_token(rollout, t, fraction) for t, fraction in enumerate(colours[k])]
        parts.append("</p><details><summary>Table</summary><table><tr><th>token<th>original<th>degraded<th>VA</tr>")
        parts += [_html_row(rollout, t) for t in range(len(rollout.tokens))]
        parts.append("</table></details>")
    parts.append("<h2>Where the visual advantage lies</h2><table>")
    parts.append("<tr><th>VA, nats<th class=l>tokens<th class=l>share of all VA</tr>")
    for name, tokens, share in histogram(reply):
        parts.append(f"<tr><td>{name}<td class='l g'>{_html_bar(tokens)}<td class=l>{_html_bar(share)}</tr>")
    return "".join([*parts, "</table></html>\n"])


def _html_token(rollout: RolloutScore, t: int, fraction: float) -> str:
    kinds = "t" + (" h" if rollout.high_group[t] else "") + (" n" if speaks_against(rollout, t) else "")
    told = (
        f"VA {rollout.visual_advantage[t]:.3f} nats; log p {rollout.teacher_logprobs[t]:.3f} original, "
        f"{rollout.degraded_logprobs[t]:.3f} degraded"
    )
    text = html.escape(rollout.tokens[t].text)
    return f'<span class="{kinds}" style="--a:{100 * fraction:.0f}%" title="{told}">{text}</span>'


def _html_row(rollout: RolloutScore, t: int) -> str:
    numbers = (rollout.teacher_logprobs[t], rollout.degraded_logprobs[t], rollout.visual_advantage[t])
    return f"<tr><td>{html.escape(rollout.tokens[t].text)}" + "".join(f"<td>{value:.3f}" for value in numbers) + "</tr>"


def _html_bar(share: float) -> str:
    return f'<span class=b style="width:{12 * share:.2f}rem"></span>{percent(share)}'


def _data_url(image: Image.Image) -> str:
    written = io.BytesIO()
    image.save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------- PNG


def picture(reply: ScoreReply, *, question: str, views: Sequence[Views]) -> Image.Image:
    """Question, both views and the coloured tokens, drawn at twice the size that they are meant for."""
    page = _Page()
    page.text(question, 40, INK)
    page.text(f"{reply.model}, degraded view: {reply.degradation.kind} {reply.degradation.strength:g}", 26, MUTED)
    page.text(summary(reply), 26, MUTED)
    for view in views:
        page.images((view.original, view.degraded))
    colours = fractions(reply)
    for k, rollout in enumerate(reply.rollouts):
        page.text(heading(reply, k), 28, INK)
        page.tokens(rollout, colours[k])
    return page.finished()


class _Page:
    width, margin, gap, picture_px, line_px = 2000, 50, 8, 420, 58

    def __init__(self) -> None:
        self._image = Image.new("RGB", (self.width, 1000), "white")
        self._y = self.margin
        self._pen = ImageDraw.Draw(self._image)

    def finished(self) -> Image.Image:
        self._room(self.margin)
        return self._image.crop((0, 0, self.width, self._y + self.margin))

    def text(self, text: str, size: int, colour: tuple[int, int, int]) -> None:
        font = _font(size)
        line = ""
        for word in [*text.split(), None]:
            longer = f"{line} {word}".strip()
            if word is not None and self._pen.textlength(longer, font) < self.width - 2 * self.margin:
                line = longer
                continue
            self._room(round(size * 1.6))
            self._pen.text((self.margin, self._y), line, colour, font)
            self._y += round(size * 1.6)
            line = word or ""

    def images(self, images: Sequence[Image.Image]) -> None:
        self._room(self.picture_px + 30)
        x = self.margin
        for image in images:
            ratio = self.picture_px / max(image.size)
            size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            way = Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.LANCZOS
            self._image.paste(image.resize(size, way), (x, self._y + 10))
            x += size[0] + 40
        self._y += self.picture_px + 40

    def tokens(self, rollout: RolloutScore, colours: Sequence[float]) -> None:
        font = _font(30)
        x = self.margin
        self._room(self.line_px)
        for t, token in enumerate(rollout.tokens):
            text = token.text.replace(" ", "·").replace("\n", "↵")
            width = max(36, round(self._pen.textlength(text, font)) + 16)
            if x + width > self.width - self.margin and x > self.margin:
                x, self._y = self.margin, self._y + self.line_px
                self._room(self.line_px)
            box = (x, self._y, x + width, self._y + self.line_px - 8)
            ground = tuple(round(255 + (heat - 255) * colours[t]) for heat in HEAT)
            outline = OUTLINE if rollout.high_group[t] else None
            self._pen.rounded_rectangle(box, 8, fill=ground, outline=outline, width=3)
            self._pen.text((x + 8, self._y + 6), text, AGAINST if speaks_against(rollout, t) else INK, font)
            x += width + self.gap
        self._y += self.line_px + 20

    def _room(self, height: int) -> None:
        """Makes the page longer when what comes next would not fit."""
        if self._y + height + self.margin > self._image.height:
            longer = Image.new("RGB", (self.width, 2 * self._image.height), "white")
            longer.paste(self._image, (0, 0))
            self._image, self._pen = longer, ImageDraw.Draw(longer)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """matplotlib's DejaVu, which knows most alphabets, where it is installed; else Pillow's own."""
    found = importlib.util.find_spec("matplotlib")
    for folder in (found.submodule_search_locations if found else None) or ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSansMono.ttf"
        if path.is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)
