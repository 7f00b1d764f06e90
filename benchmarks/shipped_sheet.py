"""The picture at the top of the README: what the shipped model draws of sixteen prompts, each the best of four.

    python benchmarks/shipped_sheet.py docs/images/emoji.png
"""

import sys

from armchair.image.sheet import contact_sheet
from armchair.sample.pipeline import load_artist

PROMPTS = (
    "a red apple",
    "dog face, twemoji",
    "grinning face, noto emoji",
    "woman astronaut, fluent color emoji",
    "purple heart",
    "a house",
    "a pizza",
    "cat face, noto emoji",
    "blue heart, firefox os emoji",
    "rainbow",
    "tomato, twemoji",
    "santa claus, noto emoji",
    "a green apple",
    "crying face, fluent flat emoji",
    "police officer, twemoji",
    "yellow circle",
)


def main() -> None:
    artist = load_artist()
    images = [artist.draw(prompt, candidates=4, seed=0).images[0] for prompt in PROMPTS]
    contact_sheet(images, PROMPTS, columns=8, scale=2).save(sys.argv[1])


if __name__ == "__main__":
    main()
