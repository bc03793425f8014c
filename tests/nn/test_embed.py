"""Patch embedding, positions and the masked-language head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from imglish.data.batch import TextBatch
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.embed import BertEmbedding, PatchEmbed, resize_grid


def test_patches_are_a_strided_convolution_of_normalised_pixels() -> None:
    torch.manual_seed(0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    embed = PatchEmbed(4, 10, mean, std)
    pixels = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    normalised = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = F.conv2d(normalised, embed.weight, embed.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(pixels), expected)
    torch.testing.assert_close(embed(normalised), expected)
    with pytest.raises(ValueError, match="does not divide"):
        embed(pixels[..., :10])


def test_positions_count_within_each_text() -> None:
    torch.manual_seed(0)
    embedding = BertEmbedding(20, 8, 6, 1e-12, 0.0)
    together = embedding(TextBatch.of([[3, 4, 5], [6, 7]]))
    alone = torch.cat([embedding(TextBatch.of([[3, 4, 5]])), embedding(TextBatch.of([[6, 7]]))])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together, torch.cat([embedding(TextBatch.of([[3, 4, 5, 6, 7]]))]))


def test_resize_keeps_class_token_and_mean() -> None:
    table = torch.randn(1 + 16, 5)
    bigger = resize_grid(table, (6, 3))
    assert bigger.shape == (19, 5)
    assert torch.equal(bigger[0], table[0])
    assert resize_grid(table, (4, 4)) is table
    with pytest.raises(ValueError, match="square"):
        resize_grid(torch.randn(1 + 15, 5), (4, 4))


def test_class_only_equals_the_first_of_all_tokens() -> None:
    torch.manual_seed(0)
    vit = VitConfig(ImageInput(16), patch=8, width=32, depth=2, heads=2).build()
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(vit(images, class_only=True), vit(images)[:, 0])
    with pytest.raises(ValueError, match="pictures of 24 x 24 pixels: resize them to 16 x 16"):
        vit(torch.randn(1, 3, 24, 24))
