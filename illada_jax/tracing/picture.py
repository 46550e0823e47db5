"""Traces as pictures: an animated GIF, or a PNG with the order of writing as colours."""

import pathlib
from typing import Any

from illada_jax.errors import InputError
from illada_jax.tracing.trace import Trace

_COLUMNS = 64  # characters of a line
_FRAME_MS, _LAST_FRAME_MS = 120, 2500
_GIVEN, _MASKED, _NEW = (40, 40, 40), (215, 215, 215), (214, 39, 40)
SUFFIXES = (".gif", ".png")


def write_picture(path: str | pathlib.Path, trace: Trace) -> None:
    """Writes `path`: a .gif of all steps, or a .png of the finished text, coloured by when each token was written.

    Raises:
      InputError: another ending, or Pillow and matplotlib are missing.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: the ending must be {' or '.join(SUFFIXES)}")
    try:
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise InputError(f"{path}: pictures need matplotlib: pip install 'illada_jax[plot]'") from error
    del Image, ImageDraw
    mono = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    font = ImageFont.truetype(str(mono), 18)
    colours = matplotlib.colormaps["viridis"]
    if path.suffix == ".png":
        _frame(trace, trace.num_steps, font, colours, by_order=True).save(path)
        return
    # Frame s shows what step s - 1 wrote, in colour.
    frames = [_frame(trace, step, font, colours, by_order=False) for step in range(trace.num_steps + 1)]
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


def _frame(trace: Trace, step: int, font: Any, colours: Any, by_order: bool) -> Any:
    """The canvas before `step`."""
    from PIL import Image, ImageDraw

    width, height = font.getlength("m"), 26
    places, lines = _layout(trace)
    image = Image.new("RGB", (int(width * _COLUMNS) + 24, height * (lines + 1) + 24), "white")
    draw = ImageDraw.Draw(image)
    visible = trace.visible[step] if step < trace.num_steps else len(trace.pieces)
    for column, runs in enumerate(places[:visible]):
        at = trace.written_at[column]
        if at < 0:
            colour = _GIVEN
        elif at >= step:
            colour = _MASKED
        elif by_order:
            colour = tuple(int(255 * c) for c in colours(0.9 * at / max(trace.num_steps - 1, 1))[:3])
        else:
            colour = _NEW if at == step - 1 else (31, 90, 180)
        for line, start, text in runs:
            corner = (12 + width * start, 12 + height * line)
            if 0 <= step <= at:
                draw.rectangle((*corner, corner[0] + width * len(text) - 2, corner[1] + height - 4), fill=colour)
            else:
                draw.text(corner, text, fill=colour, font=font)
    nfe = f"step {step} of {trace.num_steps}" + (f"   {trace.title}" if trace.title else "")
    nfe += "" if trace.agreement is None else f"   cache agrees with exact: {trace.agreement:.0%}"
    draw.text((12, 12 + height * lines), nfe, fill=(130, 130, 130), font=font)
    return image


def _layout(trace: Trace) -> tuple[list[list[tuple[int, int, str]]], int]:
    """For each column its runs (line, first character, text) in the finished text, and the number of lines."""
    places, line, at = [], 0, 0
    for piece in trace.pieces:
        runs = []
        for number, part in enumerate(piece.split("\n")):
            if number:
                line, at = line + 1, 0
            while part:
                if at >= _COLUMNS:
                    line, at = line + 1, 0
                shown, part = part[: _COLUMNS - at], part[_COLUMNS - at :]
                runs.append((line, at, shown))
                at += len(shown)
        places.append(runs)
    return places, line + 1
