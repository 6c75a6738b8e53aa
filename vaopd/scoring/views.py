"""Draws a score: coloured tokens and a histogram in the terminal, a PNG, a self-contained HTML file. Torch-free.

Colour means VA: none at 0, full at the group's largest (at least 1 nat), growing with the root so that small values
show. The high group is underlined or outlined. A token that the image speaks against is red.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vaopd.degradation import degrade, view_name, view_seed
from vaopd.http_types import RolloutScore, ScoreReply
from vaopd.images import decode, scale_to_bounds
from vaopd.telemetry.visible import escape
from vaopd.types import Degradation, EncodedImage

EDGES_NATS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, float("inf"))
AGAINST_NATS = 1.0
"""From this difference on, in nats, the image speaks against a token: the degraded view predicts it better."""
RAMP = (230, 229, 222, 221, 215, 214, 208)
"""Terminal colours (of 256) from pale to orange; black is readable on each."""
BAR_CELLS = 20
BAR_NATS_PER_CELL = 0.25
HEAT, OUTLINE, AGAINST, INK, MUTED = (255, 171, 26), (18, 58, 134), (179, 38, 30), (27, 28, 31), (90, 91, 96)


@dataclass(frozen=True, kw_only=True)
class Views:
    """One image in the original and the degraded view."""

    original: Image.Image
    degraded: Image.Image


def make_views(
    encoded: EncodedImage, degradation: Degradation, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> Views:
    """Makes both views of an image as a teacher with these pixel bounds makes them, noise included.

    None: a bound that isn't known; the picture is then taken as it is stored. Raises ImageRefused or LimitExceeded.
    """
    image = scale_to_bounds(decode(encoded), min_pixels=min_pixels or 1, max_pixels=max_pixels or sys.maxsize)
    return Views(original=image, degraded=degrade(image, degradation, seed=view_seed(encoded.sha256)))


def format_percent(share: float) -> str:
    """Formats a share, 0 to 1; only all of it becomes 100 %.

    >>> format_percent(0.99996), format_percent(1.0), format_percent(0.0731)
    ('> 99.9 %', '100.0 %', '7.3 %')
    """
    return "> 99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def compute_fractions(reply: ScoreReply) -> list[list[float]]:
    """Returns the strength of each token's colour, 0 to 1, by rollout."""
    scale = max(1.0, *(max(rollout.visual_advantage) for rollout in reply.rollouts))
    return [[(va / scale) ** 0.5 for va in rollout.visual_advantage] for rollout in reply.rollouts]


def summarise(reply: ScoreReply) -> str:
    """Returns one sentence about how VA is spread over the tokens."""
    tokens = sum(len(rollout.tokens) for rollout in reply.rollouts)
    if reply.share_of_top_10 is None or reply.share_of_top_20 is None:
        return f"Seeing the image helps with none of the {tokens} tokens."
    return (
        f"Of {tokens} tokens the top 10 % carry {format_percent(reply.share_of_top_10)} of the visual advantage, "
        f"the top 20 % carry {format_percent(reply.share_of_top_20)}."
    )


def describe_source(reply: ScoreReply) -> str:
    """Names the teacher and the degraded view, with its strength if it has one."""
    view = Degradation(kind=reply.degradation.kind, strength=reply.degradation.strength)
    return f"{escape(reply.model)}, degraded view: {view_name(view).replace(':', ' ')}"


def make_heading(reply: ScoreReply, k: int) -> str:
    """Returns the heading of response k: its weight in the group and its mean VA."""
    rollout = reply.rollouts[k]
    weight = f"weight {rollout.rollout_weight:.3f}, " if len(reply.rollouts) > 1 else ""
    return f"Response {k + 1}: {weight}mean VA {rollout.mean_visual_advantage:.4f} nats per token"


def make_histogram(reply: ScoreReply) -> list[tuple[str, float, float]]:
    """Returns each range of VA with its name, its share of all tokens and its share of all VA."""
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


def make_terminal_lines(reply: ScoreReply, *, colour: bool, table: bool) -> Iterator[str]:
    """Yields the score's lines: coloured running text, or with `table` a line per token; then the histogram."""
    colours = compute_fractions(reply)
    for k, rollout in enumerate(reply.rollouts):
        yield _make_bold(make_heading(reply, k)) if colour else make_heading(reply, k)
        if table or not colour:
            yield from _make_table(rollout)
        else:
            yield "".join(_colour(rollout, t, fraction) for t, fraction in enumerate(colours[k]))
        yield ""
    yield f"{'VA, nats':<12} {'tokens':<{BAR_CELLS + 8}} share of all VA"
    for name, tokens, share in make_histogram(reply):
        columns = [f"{_draw_bar(part)} {format_percent(part):>7}" for part in (tokens, share)]
        yield f"{name:<12} {'  '.join(columns)}"
    yield summarise(reply)


def _make_table(rollout: RolloutScore) -> Iterator[str]:
    """Yields a line per token: text, log-probs, VA in nats, further columns, a star for the high group, and a bar."""
    further = rollout.columns
    yield f"{'token':<18} {'original':>9} {'degraded':>9} {'VA':>7}" + "".join(f" {name}" for name in further)
    columns = (rollout.tokens, rollout.teacher_logprobs, rollout.degraded_logprobs, rollout.visual_advantage)
    for t, (token, teacher, degraded, va) in enumerate(zip(*columns, strict=True)):
        numbers = f"{teacher:9.3f} {degraded:9.3f} {va:7.3f}"
        numbers += "".join(f" {values[t]:{len(name)}.3f}" for name, values in further.items())
        bar = "█" * min(round(va / BAR_NATS_PER_CELL), BAR_CELLS)
        yield f"{token.text!r:<18} {numbers} {'*' if rollout.high_group[t] else ' '} {bar}".rstrip()


def _colour(rollout: RolloutScore, t: int, fraction: float) -> str:
    codes = []
    if fraction > 1 / (2 * len(RAMP)):
        codes += ["30", f"48;5;{RAMP[min(int(fraction * len(RAMP)), len(RAMP) - 1)]}"]
    if rollout.high_group[t]:
        codes.append("4")
    if speaks_against(rollout, t):
        codes.append("31")
    # A token may hold control sequences of the terminal.
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in rollout.tokens[t].text)
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text


def speaks_against(rollout: RolloutScore, t: int) -> bool:
    """Returns whether the image speaks against token t."""
    return rollout.degraded_logprobs[t] - rollout.teacher_logprobs[t] > AGAINST_NATS


def _make_bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m"


def _draw_bar(share: float) -> str:
    return ("█" * round(share * BAR_CELLS)).ljust(BAR_CELLS)


# ------------------------------------------------------------------------------------------- HTML


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("vaopd.scoring", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)


def render_html(reply: ScoreReply, *, question: str, views: Sequence[Views]) -> str:
    """Returns the whole score as one HTML file that loads nothing."""
    return _TEMPLATES.get_template("views.html.jinja").render(
        question=question,
        reply=reply,
        source=describe_source(reply),
        summary=summarise(reply),
        views=[(_make_data_url(view.original), _make_data_url(view.degraded)) for view in views],
        responses=[
            (make_heading(reply, k), list(_make_tokens(rollout, colours)))
            for k, (rollout, colours) in enumerate(zip(reply.rollouts, compute_fractions(reply), strict=True))
        ],
        histogram=make_histogram(reply),
        percent=format_percent,
    )


def _make_tokens(rollout: RolloutScore, colours: Sequence[float]) -> Iterator[dict[str, Any]]:
    columns = (rollout.teacher_logprobs, rollout.degraded_logprobs, rollout.visual_advantage)
    for t, token in enumerate(rollout.tokens):
        original, degraded, va = numbers = [f"{column[t]:.3f}" for column in columns]
        yield {
            "text": token.text,
            "colour": colours[t],
            "high": rollout.high_group[t],
            "against": speaks_against(rollout, t),
            "numbers": numbers,
            "title": f"VA {va} nats; log p {original} original, {degraded} degraded",
        }


def _make_data_url(image: Image.Image) -> str:
    written = io.BytesIO()
    image.save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------- PNG


def draw_picture(reply: ScoreReply, *, question: str, views: Sequence[Views]) -> Image.Image:
    """Draws question, both views and the coloured tokens, at twice the size for sharp screens."""
    page = _Page()
    page.draw_text(question, 40, INK)
    page.draw_text(describe_source(reply), 26, MUTED)
    page.draw_text(summarise(reply), 26, MUTED)
    for view in views:
        page.draw_images((view.original, view.degraded))
    colours = compute_fractions(reply)
    for k, rollout in enumerate(reply.rollouts):
        page.draw_text(make_heading(reply, k), 28, INK)
        page.draw_tokens(rollout, colours[k])
    return page.finish()


class _Page:
    width, margin, gap, picture_px, line_px = 2000, 50, 8, 420, 58

    def __init__(self) -> None:
        self._image = Image.new("RGB", (self.width, 1000), "white")
        self._y = self.margin
        self._pen = ImageDraw.Draw(self._image)

    def finish(self) -> Image.Image:
        self._make_room(self.margin)
        return self._image.crop((0, 0, self.width, self._y + self.margin))

    def draw_text(self, text: str, size: int, colour: tuple[int, int, int]) -> None:
        font = _load_font(size)
        line = ""
        for word in [*text.split(), None]:
            longer = f"{line} {word}".strip()
            if word is not None and self._pen.textlength(longer, font) < self.width - 2 * self.margin:
                line = longer
                continue
            self._make_room(round(size * 1.6))
            self._pen.text((self.margin, self._y), line, colour, font)
            self._y += round(size * 1.6)
            line = word or ""

    def draw_images(self, images: Sequence[Image.Image]) -> None:
        self._make_room(self.picture_px + 30)
        x = self.margin
        for image in images:
            ratio = self.picture_px / max(image.size)
            size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            way = Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.LANCZOS
            self._image.paste(image.resize(size, way), (x, self._y + 10))
            x += size[0] + 40
        self._y += self.picture_px + 40

    def draw_tokens(self, rollout: RolloutScore, colours: Sequence[float]) -> None:
        font = _load_font(30)
        x = self.margin
        self._make_room(self.line_px)
        for t, token in enumerate(rollout.tokens):
            text = token.text.replace(" ", "·").replace("\n", "↵")
            width = max(36, round(self._pen.textlength(text, font)) + 16)
            if x + width > self.width - self.margin and x > self.margin:
                x, self._y = self.margin, self._y + self.line_px
                self._make_room(self.line_px)
            box = (x, self._y, x + width, self._y + self.line_px - 8)
            ground = tuple(round(255 + (heat - 255) * colours[t]) for heat in HEAT)
            outline = OUTLINE if rollout.high_group[t] else None
            self._pen.rounded_rectangle(box, 8, fill=ground, outline=outline, width=3)
            self._pen.text((x + 8, self._y + 6), text, AGAINST if speaks_against(rollout, t) else INK, font)
            x += width + self.gap
        self._y += self.line_px + 20

    def _make_room(self, height: int) -> None:
        """Makes the page longer where the next `height` pixels would not fit."""
        if self._y + height + self.margin > self._image.height:
            longer = Image.new("RGB", (self.width, 2 * self._image.height), "white")
            longer.paste(self._image, (0, 0))
            self._image, self._pen = longer, ImageDraw.Draw(longer)


def _load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns matplotlib's DejaVu font, which knows most alphabets, if installed; else Pillow's own."""
    found = importlib.util.find_spec("matplotlib")
    for folder in (found.submodule_search_locations if found else None) or ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSansMono.ttf"
        if path.is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)
