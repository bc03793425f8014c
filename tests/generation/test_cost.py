"""Writing costs what it has to: a picture's keys once, a row a token of a live text."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from imglish.generation.config import GenerationConfig
from imglish.generation.engine import generate
from imglish.models.capabilities import EncodedImages
from imglish.models.registry import named


def measured(tokens: torch.Tensor, config: GenerationConfig) -> int:
    """Floating-point operations of writing about encoded pictures, the attention itself left out."""
    torch.manual_seed(0)
    model = named("blip-tiny").build().eval()
    prompts, keys = [[500, 7, 8, 9]] * len(tokens), [str(i) for i in range(len(tokens))]
    with FlopCounterMode(display=False) as counter:
        generate(model, EncodedImages(tokens[:, 0], tokens), prompts, 3, config, keys)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "attention" not in str(operation))


def test_flop_of_beams_and_samples() -> None:
    config = named("blip-tiny")
    pictures, rows, steps = 3, 37, 12 - 4 - 1  # the last token of a text is written and never read
    width, depth, hidden, vocabulary = config.width, config.depth, config.hidden, config.vocab_size
    tokens = torch.randn(pictures, rows, config.vision.width, generator=torch.Generator().manual_seed(1))
    projected = 2 * pictures * rows * depth * config.vision.width * 2 * width
    row = 2 * depth * (6 * width**2 + 2 * width * hidden)  # queries, keys, values, both outputs, query of the picture
    head = 2 * (width**2 + width * vocabulary)
    prompt = pictures * (4 * row + head)
    for texts, how in (
        (1, GenerationConfig(min_length=12, max_length=12)),
        (3, GenerationConfig(beams=3, min_length=12, max_length=12)),
        (5, GenerationConfig(sample=True, n=5, min_length=12, max_length=12)),
    ):
        assert measured(tokens, how) == projected + prompt + texts * pictures * steps * (row + head)
