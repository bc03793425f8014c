"""BEiT: only masked rows pass the last layer and the head; the step costs what it must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from imglish.data.batch import Batch, TextBatch
from imglish.models.beit import Beit, beit_base, beit_tiny
from imglish.models.visual_codes import CodeTeacher
from tests.models.test_beit3 import FakeTokenizer, masks_of
from tests.models.test_visual_tokenizers import pictures


def batch_of(images: Tensor, masks: object) -> Batch:
    count = len(images)
    return Batch(images, TextBatch.of([[]] * count), torch.arange(count), torch.zeros(count, 2), patches=masks)  # type: ignore[arg-type]


def trained() -> Beit:
    torch.manual_seed(0)
    model = beit_tiny().build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.8 / parameter.shape[-1] ** 0.5)
    return model


def test_masked_rows_are_those_of_the_whole_pass() -> None:
    model, images = trained(), pictures(3)
    masks = masks_of(model.config, 3)  # type: ignore[arg-type]
    whole = model.head(model.tokens(images, masks)[:, 1:]).flatten(0, 1)
    torch.testing.assert_close(model.fill_patches(images, masks), whole[masks.rows], rtol=1e-4, atol=1e-5)


def test_what_is_masked_is_not_seen() -> None:
    model, images = trained(), pictures(2)
    masks = masks_of(model.config, 2)  # type: ignore[arg-type]
    other = images.clone()
    cells = other.view(2, 3, 6, 8, 6, 8).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    cells[masks.rows] = 255 - cells[masks.rows]
    changed = cells.view(2, 6, 6, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    assert not torch.equal(changed, images)
    torch.testing.assert_close(model.fill_patches(images, masks), model.fill_patches(changed, masks))


def test_step() -> None:
    model, images = trained(), pictures(3)
    masks = masks_of(model.config, 3)  # type: ignore[arg-type]
    teacher = CodeTeacher(FakeTokenizer(model.config.codes), model.config.codes)
    found = model.losses(batch_of(images, masks), teacher)
    codes = FakeTokenizer(model.config.codes).tokenize(images, (6, 6)).flatten()[masks.rows]
    expected = torch.nn.functional.cross_entropy(model.fill_patches(images, masks), codes)
    torch.testing.assert_close(found["mim"], expected)
    with pytest.raises(ValueError, match="masked patches"):
        model.losses(replace(batch_of(images, masks), patches=None), teacher)


def test_step_tflop() -> None:
    config = replace(beit_base(), drop_path=0.0)
    count, images = 8, torch.zeros(8, 3, 224, 224, dtype=torch.uint8)
    masks = masks_of(config, count)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = config.build().to("meta")
    with FlopCounterMode(display=False) as counter:
        logits = model.fill_patches(images.to("meta"), masks.map(lambda x: x.to("meta")))
        logits.sum().backward()
    width, tokens, masked = config.width, count * 197, len(masks.rows)
    rows = 3 * 24 * width**2 * tokens * 11 + 3 * (4 * width**2 * tokens + 20 * width**2 * masked)
    least = rows + 3 * 2 * width * config.codes * masked + 2 * 2 * count * 196 * width * 768
    found = counter.get_total_flops()
    print(f"BEiT-base, 8 pictures: {found / 1e12:.3f} TFLOP, matrices alone {least / 1e12:.3f}")
    assert least <= found <= 1.12 * least
