"""Words in pictures: lines that fit, in a font that has their letters."""

import functools
import re

from PIL import ImageDraw, ImageFont

TRIAL_PX = 19  # a size in which fonts are looked at
# Pillow's own font has Latin letters alone; these, where one is installed, have Chinese ones too
CHINESE_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf"),
    *("SourceHanSansCN-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),  # Linux
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Medium.ttc", "Arial Unicode.ttf"),  # macOS
    *("msyh.ttc", "simhei.ttf", "simsun.ttc"),  # Windows
)
NO_GLYPH = "\U000ffffe"  # never a character, so a font draws its box for it


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels, broken between words and between Chinese characters."""
    lines = [""]
    for piece in re.findall(r"[^\s\u2e80-\uffef]{1,40}|\s+|[\u2e80-\uffef][，。、；：？！）》」』”’]*", text):
        if font.getlength(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return lines


def write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, colour: str) -> None:
    """One line of text of our own."""
    pen.text(corner, legible(text) or "?", fill=colour, font=font_for(text, size))


def legible(text: str) -> str | None:
    """`text` with a question mark for each character that no font has, None where that would be the most of it."""
    name = best_font(text)
    shown = "".join(char if has_glyph(name, char) else "?" for char in " ".join(text.split()))
    return shown if sum(char not in "? " for char in shown) * 2 > sum(not char.isspace() for char in text) else None


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font that has the most of `text`."""
    return load_font(best_font(text), size)


def best_font(text: str) -> str | None:
    """The first of the installed fonts that lacks fewest characters of `text`; None is Pillow's own."""
    return min(installed_fonts(), key=lambda name: sum(not has_glyph(name, char) for char in set(text)))


@functools.cache
def installed_fonts() -> tuple[str | None, ...]:
    """Pillow's own font and the Chinese ones of this machine."""

    def there(name: str) -> bool:
        try:
            load_font(name, TRIAL_PX)
        except OSError:
            return False
        return True

    return None, *filter(there, CHINESE_FONTS)


@functools.cache
def load_font(name: str | None, size: int) -> ImageFont.FreeTypeFont:
    """A font by its file name, looked for where the system keeps fonts; raises OSError where it is not."""
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


@functools.cache
def has_glyph(name: str | None, char: str) -> bool:
    """Whether a font can draw `char` as itself and not as the box for what it lacks."""
    if char.isspace():
        return True
    font = load_font(name, TRIAL_PX)
    return bytes(font.getmask(char)) != bytes(font.getmask(NO_GLYPH))
