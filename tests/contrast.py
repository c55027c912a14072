"""The contrast of what a page shows, from its pixels: colours in a stylesheet say little about a theme's own."""

import io

from PIL import Image

LEGIBLE = 4.5  # WCAG 2.2, 1.4.3, for text of usual size


def luminance(colour: tuple[int, int, int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(png: bytes) -> float:
    """The highest contrast of any colour of a picture to its commonest one, which lies behind the text."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    pixels = image.getcolors(image.width * image.height)
    behind = luminance(max(pixels)[1])
    return max(
        (max(light, behind) + 0.05) / (min(light, behind) + 0.05)
        for light in (luminance(colour) for _, colour in pixels)
    )


def faint(page, texts: list[str]) -> dict[str, float]:
    """Which of the visible `texts` of a page are not legible, and their contrast."""
    found = {}
    for text in texts:
        place = page.get_by_text(text, exact=True).locator("visible=true").first
        found[text] = contrast(place.screenshot(timeout=20_000))
    return {text: ratio for text, ratio in found.items() if ratio < LEGIBLE}
