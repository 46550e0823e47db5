"""Traces as pictures: an animated GIF of the steps, or a PNG with the order of writing as colours."""

import importlib.util
import math
import pathlib
from typing import Any

from illada_jax.errors import InputError
from illada_jax.tracing.trace import Trace

_COLUMNS = 64  # characters per line
_FONT_SIZE, _LINE_HEIGHT, _MARGIN = 22, 38, 28
_LAST_FRAME_MS = 2500
# The colours of page.css.
_PAPER, _INK, _QUIET, _MASK, _OPEN = (255, 255, 255), (31, 35, 40), (102, 108, 116), (237, 235, 230), (213, 210, 202)
_NEW, _ACCENT = (255, 216, 131), (44, 103, 201)
SUFFIXES = (".gif", ".png")


def check_picture(path: pathlib.Path) -> None:
    """Raises InputError if `write_picture` could not write `path`, for its suffix or a missing package."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: the suffix must be {' or '.join(SUFFIXES)}")
    if not all(map(importlib.util.find_spec, ("matplotlib", "PIL"))):
        raise InputError(f"{path}: pictures need matplotlib: pip install 'illada_jax[plot]'")


def write_picture(path: str | pathlib.Path, trace: Trace) -> None:
    """Writes `path`: a .gif of all steps, or a .png of the finished text with the order of writing as colours.

    Raises:
      InputError: the suffix is not one of SUFFIXES, or Pillow or matplotlib is not installed.
    """
    path = pathlib.Path(path)
    check_picture(path)
    import matplotlib
    from PIL import ImageFont

    fonts = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), _FONT_SIZE)
    small = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 17)
    if path.suffix == ".png":
        _frame(trace, trace.num_steps, font, small, by_order=True).save(path)
        return
    # Frame s marks the tokens of step s - 1; the last frame marks nothing, so that it can be read.
    frames = [_frame(trace, step, font, small, by_order=False) for step in range(trace.num_steps + 1)]
    # Long texts play faster, as on the page: about ten seconds in total.
    step_ms = int(min(400, max(60, 10000 / max(trace.num_steps, 1))))
    durations = [step_ms] * (len(frames) - 1) + [_LAST_FRAME_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


def _frame(trace: Trace, step: int, font: Any, small: Any, by_order: bool) -> Any:
    """Image of the canvas before `step`."""
    from PIL import Image, ImageDraw

    width = font.getlength("m")
    places, lines = _layout(trace)
    image = Image.new("RGB", (int(width * _COLUMNS) + 2 * _MARGIN, _LINE_HEIGHT * lines + 2 * _MARGIN + 44), _PAPER)
    draw = ImageDraw.Draw(image)
    steps = trace.num_steps
    visible = trace.visible[step] if step < steps else len(trace.pieces)
    for column, runs in enumerate(places[:visible]):
        at = trace.written_at[column]
        given, masked = at < 0, at >= step
        quiet = given or (trace.end is not None and column >= trace.end)
        back = None
        if masked:
            back = _OPEN if step < steps and column in trace.candidates[step] else _MASK
        elif by_order and not given:
            back = shade(at / max(steps - 1, 1))
        elif 0 <= at == step - 1 and step < steps:
            back = _NEW
        for line, start, text in runs:
            x, y = _MARGIN + width * start, _MARGIN + _LINE_HEIGHT * line
            if back:
                gap = 1 if masked else 0
                draw.rounded_rectangle((x + gap, y, x + width * len(text) - 1 - gap, y + _LINE_HEIGHT - 7), 4, back)
            if not masked:
                draw.text((x, y + 2), text, fill=_QUIET if quiet else _INK, font=font)
    _footer(draw, trace, step, small, by_order, image.width, image.height - _MARGIN - 22)
    return image


def _footer(draw: Any, trace: Trace, step: int, font: Any, by_order: bool, width: int, y: int) -> None:
    """Draws the strategy and the progress bar, or the key to the colours."""
    words = [f"{trace.nfe} evaluations"] if trace.nfe else []
    words += [] if trace.agreement is None else [f"cache agrees with exact: {trace.agreement:.0%}"]
    words = " · ".join([*words, trace.strategy or trace.title])
    left, right = _MARGIN, width - _MARGIN
    if by_order:
        cells, size = 12, 14
        start = right - int(font.getlength("last")) - 8 - cells * size
        draw.text((right, y), "last", fill=_QUIET, font=font, anchor="ra")
        draw.text((start - 8, y), "first", fill=_QUIET, font=font, anchor="ra")
        for cell in range(cells):
            x = start + cell * size
            draw.rectangle((x, y + 3, x + size - 1, y + 16), shade(cell / (cells - 1)))
        max_width = start - 8 - font.getlength("first") - 16 - left
    else:
        count = f"step {step} of {trace.num_steps}"
        draw.text((right, y), count, fill=_QUIET, font=font, anchor="ra")
        max_width = right - font.getlength(count) - 16 - left
        draw.rectangle((left, y - 12, right, y - 10), _MASK)
        if step:
            draw.rectangle((left, y - 12, left + (right - left) * step / trace.num_steps, y - 10), _ACCENT)
    words = words.replace("\n", " ")
    if font.getlength(words) > max_width:
        while words and font.getlength(words + "…") > max_width:
            words = words[:-1]
        words += "…"
    draw.text((left, y), words, fill=_QUIET, font=font)


def shade(share: float) -> tuple[int, int, int]:
    """The colour of the order in page.css: OKLCH(0.95 … 0.74, 0.1, 95° … 290°) as sRGB.

    >>> shade(0.0), shade(1.0)
    ((255, 238, 160), (170, 160, 230))
    """
    lightness, hue = 0.95 - 0.21 * share, math.radians(95 + 195 * share)
    a, b = 0.1 * math.cos(hue), 0.1 * math.sin(hue)
    # Björn Ottosson, "A perceptual color space for image processing" (2020).
    l3 = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m3 = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s3 = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (4.0767416621 * l3 - 3.3077115913 * m3 + 0.2309699292 * s3,
              -1.2684380046 * l3 + 2.6097574011 * m3 - 0.3413193965 * s3,
              -0.0041960863 * l3 - 0.7034186147 * m3 + 1.7076147010 * s3)
    clipped = [min(max(value, 0.0), 1.0) for value in linear]
    red, green, blue = (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in clipped)
    return round(255 * red), round(255 * green), round(255 * blue)


def _layout(trace: Trace) -> tuple[list[list[tuple[int, int, str]]], int]:
    """Runs (line, first character, text) of each column in the finished text, and the number of lines."""
    places, line, at = [], 0, 0
    for piece in trace.pieces:
        runs = []
        for number, part in enumerate(piece.split("\n")):
            if number:
                line, at = line + 1, 0
            if at and at + len(part.rstrip()) > _COLUMNS >= len(part):  # wrap before a token that fits on a line
                line, at, part = line + 1, 0, part.removeprefix(" ")
            while part:
                if at >= _COLUMNS:
                    line, at = line + 1, 0
                shown, part = part[: _COLUMNS - at], part[_COLUMNS - at :]
                runs.append((line, at, shown))
                at += len(shown)
        places.append(runs)
    return places, line + 1
