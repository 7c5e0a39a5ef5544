"""The captions that models are timed with. No torch."""

from __future__ import annotations

__all__ = ["CAPTIONS", "captions"]

CAPTIONS = (
    "a brown dog runs through the tall grass with a ball .",
    "two children play in the sand .",
    "a man in a red jacket rides his bicycle down a steep road .",
    "a woman sits on a bench and reads a newspaper .",
    "people wait for the bus .",
    "a football player in a white shirt kicks the ball past the goalkeeper while the crowd behind him cheers .",
    "a girl with a yellow umbrella walks along a wet street .",
    "three friends sit around a fire at night .",
    "a black and white cat sleeps on a blue chair .",
    "the boy jumps into the swimming pool from the side .",
    "a climber hangs from a rock high above the sea .",
    "a plate of fruit stands on a wooden table beside a glass of water .",
    "an old man feeds the birds in the park .",
    "a snowboarder jumps over a ramp .",
    "a group of tourists takes pictures of a tall church on a sunny day .",
    "a dog shakes off water on the beach .",
    "the woman in the green dress laughs .",
    "a worker with a yellow helmet climbs up a ladder beside a brick wall .",
    "horses stand in a field behind a fence .",
    "a baby holds a spoon and looks at the camera .",
    "two men play chess at a small table in front of a cafe .",
    "a surfer rides a big wave .",
    "a street musician plays the violin while a little girl and her mother stop to listen .",
    "a white boat lies in the harbour .",
    "cars drive over a bridge in the evening .",
    "a boy in a striped shirt throws a stick for his dog .",
    "a skier goes down a hill covered in fresh snow .",
    "a couple dances in a room full of people .",
    "the red train stops at an empty station .",
    "a man cooks fish on a grill in his garden .",
    "a young woman ties her running shoes on the steps of a stadium .",
    "a small bird sits on a branch .",
)
"""Captions as long as those of Flickr8k: 8 to 22 tokens, 13 on average; the first one has 14."""


def captions(count: int) -> list[str]:
    """Return the first ``count`` of ``CAPTIONS``, repeated if there are fewer."""
    return [CAPTIONS[number % len(CAPTIONS)] for number in range(count)]
