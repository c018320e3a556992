"""The demo's picture: every frame that was asked about, with question, answer and truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from edgellm_ros.convert import RGB

COLUMNS = 5
PICTURE_WIDTH = 368
MARGIN, PADDING, LINE_GAP = 24, 14, 6
TITLE_SIZE, SUBTITLE_SIZE, QUESTION_SIZE, TEXT_SIZE, FIGURES_SIZE = 34, 20, 19, 17, 15
BACKGROUND, CARD = (24, 27, 33), (38, 43, 52)
BRIGHT, DIM = (240, 242, 245), (150, 158, 170)
GREEN, RED = (94, 201, 128), (235, 101, 95)
MARK = 26  # side of the right/wrong mark, pixels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Line = tuple[str, Font, tuple[int, int, int]]


@dataclass(frozen=True)
class Panel:
    """One question: the frame it was answered from, what was said, what is true, and a line of figures."""

    frame: RGB
    question: str
    answer: str
    truth: str
    figures: str

    @property
    def right(self) -> bool:
        """Whether the answer is word for word the truth."""
        return self.answer == self.truth


def save_picture(path: Path, panels: Sequence[Panel], title: str, subtitle: str) -> None:
    """Draw all panels in a grid and save them as one image file."""
    cards = [_card_lines(panel) for panel in panels]
    frame_height = max(round(PICTURE_WIDTH * p.frame.shape[0] / p.frame.shape[1]) for p in panels)
    card_width = PICTURE_WIDTH + 2 * PADDING
    card_height = frame_height + max(_height(lines) for lines in cards) + 3 * PADDING
    rows = -(-len(panels) // COLUMNS)
    header = TITLE_SIZE + SUBTITLE_SIZE + 3 * LINE_GAP + MARGIN
    columns = min(COLUMNS, len(panels))
    width = MARGIN + columns * (card_width + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + header + rows * (card_height + MARGIN)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, BRIGHT, _font(TITLE_SIZE))
    draw.text((MARGIN, MARGIN + TITLE_SIZE + 2 * LINE_GAP), subtitle, DIM, _font(SUBTITLE_SIZE))
    for index, (panel, lines) in enumerate(zip(panels, cards, strict=True)):
        left = MARGIN + index % COLUMNS * (card_width + MARGIN)
        top = MARGIN + header + index // COLUMNS * (card_height + MARGIN)
        draw.rounded_rectangle((left, top, left + card_width, top + card_height), 10, CARD)
        picture = Image.fromarray(panel.frame)
        picture = picture.resize((PICTURE_WIDTH, round(PICTURE_WIDTH * picture.height / picture.width)))
        sheet.paste(picture, (left + PADDING, top + PADDING))
        _draw_mark(draw, left + card_width - PADDING - MARK - 6, top + PADDING + 6, panel.right)
        y = top + frame_height + 2 * PADDING
        for text, font, color in lines:
            draw.text((left + PADDING, y), text, color, font)
            y += _line_height(font)
    sheet.save(path)


def _card_lines(panel: Panel) -> list[Line]:
    """The text below a frame, wrapped to its width."""
    question, text = _font(QUESTION_SIZE), _font(TEXT_SIZE)
    parts = [
        (panel.question, question, BRIGHT),
        (panel.answer or "(no answer)", text, GREEN if panel.right else RED),
        (f"truth: {panel.truth}", text, DIM),
        (panel.figures, _font(FIGURES_SIZE), DIM),
    ]
    return [(line, font, color) for words, font, color in parts for line in _wrap(words, font)]


def _wrap(text: str, font: Font) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= PICTURE_WIDTH:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A tick or a cross, drawn: not every font has the characters."""
    draw.ellipse((x, y, x + MARK, y + MARK), GREEN if right else RED)
    strokes = [((0.26, 0.53), (0.43, 0.70), (0.74, 0.34))]
    if not right:
        strokes = [((0.30, 0.30), (0.70, 0.70), (0.70, 0.70)), ((0.30, 0.70), (0.70, 0.30), (0.70, 0.30))]
    for stroke in strokes:
        draw.line([(x + MARK * a, y + MARK * b) for a, b in stroke], (255, 255, 255), 3, joint="curve")


def _font(size: int) -> Font:
    """Pillow's own font: the same on every machine."""
    return ImageFont.load_default(size)


def _line_height(font: Font) -> int:
    return round(font.getbbox("Ag")[3]) + LINE_GAP


def _height(lines: Sequence[Line]) -> int:
    return sum(_line_height(font) for _, font, _ in lines)
