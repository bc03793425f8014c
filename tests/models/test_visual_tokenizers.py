"""Visual tokenizers learn codes that keep something of the picture, and say when their codebook collapses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.data.batch import Batch, TextBatch
from imglish.models.clip import clip_tiny
from imglish.models.dvae import DVae, dvae_base, dvae_tiny
from imglish.models.visual_codes import TokenizesImages
from imglish.models.vqkd import Distillation, VqKd, kmeans, vqkd_tiny
from imglish.objectives.codes import code_usage, kl_to_uniform, logit_laplace, map_pixels, unmap_pixels, untold
from tests.ranks import run_ranks


def pictures(count: int, size: int = 48, seed: int = 0) -> Tensor:
    """Coloured squares on coloured ground, uint8."""
    rng = np.random.default_rng(seed)
    made = np.zeros((count, 3, size, size), dtype=np.uint8)
    for picture in made:
        picture[:] = rng.integers(0, 256, (3, 1, 1))
        top, left = rng.integers(0, size // 2, 2)
        picture[:, top : top + size // 2, left : left + size // 2] = rng.integers(0, 256, (3, 1, 1))
    return torch.from_numpy(made)


def batch_of(images: Tensor) -> Batch:
    count = len(images)
    return Batch(images, TextBatch.of([[]] * count), torch.arange(count), torch.zeros(count, 2))


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([v for k, v in losses.items() if not k.startswith("metric/")]).sum()


def test_dvae_learns_codes() -> None:
    torch.manual_seed(0)
    model = replace(dvae_tiny(), anneal_epochs=0.6, kl_weight=0.0).build()
    teacher, data = model.make_teacher(), pictures(24)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = (model.reconstruct(data) - data / 255).abs().mean()
    for step in range(60):
        teacher.at(step / 60)
        total(model.losses(batch_of(data[torch.randperm(24)[:12]]), teacher)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    after = (model.reconstruct(data) - data / 255).abs().mean()
    codes = model.tokenize(data, (6, 6))
    assert after < 0.9 * before
    assert len(codes.unique()) >= 4


def test_temperature_and_divergence_follow_progress() -> None:
    config = replace(dvae_tiny(), temperature=(1.0, 0.0625), anneal_epochs=4.0, kl_weight=2.0, kl_epochs=2.0)
    teacher = config.build().make_teacher()
    assert (teacher.temperature, teacher.kl_weight) == (1.0, 0.0)
    teacher.at(1.0)
    assert teacher.kl_weight == pytest.approx(1.0)
    teacher.at(9.0)
    assert (teacher.temperature, teacher.kl_weight) == (pytest.approx(0.0625), 2.0)


def test_dvae_of_the_paper() -> None:
    with torch.device("meta"):
        model = dvae_base().build()
    encoder = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("read", "encoder", "to_codes")))
    assert model.config.cell == 8
    assert round(encoder / 1e6) == 54  # the published encoder: 53.8 M


def test_codes_at_any_size() -> None:
    model, data = dvae_tiny().build(), pictures(3)
    assert isinstance(model, TokenizesImages)
    assert model.tokenize(data, (6, 6)).shape == (3, 36)
    assert torch.equal(model.tokenize(data, (6, 6)), model.encode(data / 255).argmax(1).flatten(1))
    assert model.tokenize(data, (3, 4)).shape == (3, 12)
    with pytest.raises(ValueError, match="uint8"):
        model.tokenize(data / 255, (6, 6))


def test_logit_laplace_is_a_density() -> None:
    x = torch.linspace(1e-4, 1 - 1e-4, 20001)
    density = torch.stack([(-logit_laplace(v[None], torch.tensor([0.7]), torch.tensor([-0.3]))).exp() for v in x])
    assert torch.trapezoid(density, x) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)


def test_what_codes_tell() -> None:
    one_code = torch.full((2, 8, 3, 3), -40.0)
    one_code[:, 3] = 40.0
    pictures = F.one_hot((torch.arange(8).view(8, 1, 1) + torch.arange(4).view(1, 2, 2)) % 8, 8)
    told = pictures.permute(0, 3, 1, 2).float() * 80  # at each place every picture has a code of its own
    places = told[:1].expand(8, -1, -1, -1)  # a code for each place, whatever the picture
    most = float(np.log(8))
    assert float(untold(one_code)) == pytest.approx(most, abs=1e-4)
    assert float(untold(torch.zeros(2, 8, 3, 3))) == pytest.approx(most, abs=1e-4)
    assert float(untold(told)) == pytest.approx(0.0, abs=1e-4)
    assert float(untold(places)) == pytest.approx(most, abs=1e-4)
    assert float(kl_to_uniform(torch.zeros(2, 8, 3, 3))) == pytest.approx(0.0, abs=1e-6)
    assert float(kl_to_uniform(one_code)) == pytest.approx(most, abs=1e-4)
    assert float(code_usage(told.argmax(1), 8)) == pytest.approx(1.0)
    assert float(code_usage(one_code.argmax(1), 8)) == pytest.approx(1 / 8)


def tokenizer_and_teacher(restart: float = 0.05) -> tuple[VqKd, Distillation]:
    torch.manual_seed(0)
    source = clip_tiny().build()
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.8 / parameter.shape[-1] ** 0.5)
    model = replace(vqkd_tiny(), restart=restart).build()
    return model, model.make_teacher(source)


def test_vqkd_learns_from_its_teacher() -> None:
    model, teacher = tokenizer_and_teacher()
    data = pictures(24)
    frozen = [p.clone() for p in teacher.model.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = None
    for _ in range(40):
        losses = model.losses(batch_of(data[torch.randperm(24)[:12]]), teacher)
        first = losses["distillation"].detach() if first is None else first
        total(losses).backward()
        optimiser.step()
        optimiser.zero_grad()
        teacher.update(model)
    assert first is not None
    assert losses["distillation"] < 0.8 * first
    assert len(model.tokenize(data, (6, 6)).unique()) >= 8
    torch.testing.assert_close(model.codebook.norm(dim=1), torch.ones(model.codes))
    assert all(torch.equal(a, b) for a, b in zip(frozen, teacher.model.parameters(), strict=True))


def test_codebook_moves_to_the_vectors_that_chose_it() -> None:
    model, teacher = tokenizer_and_teacher(restart=0.0)
    model.started.fill_(True)
    book = model.codebook.clone()
    vectors = F.normalize(torch.randn(50, model.config.code_width), dim=1)
    chosen = model.nearest(vectors)
    teacher.remember(vectors, chosen)
    teacher.update(model)
    for code in range(model.codes):
        mine = vectors[chosen == code]
        if len(mine):
            mean = F.normalize(mine.sum(0), dim=0)
            moved = F.normalize(0.99 * book[code] + 0.01 * mean, dim=0)
            torch.testing.assert_close(model.codebook[code], moved, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(model.codebook[code], book[code])


def test_dead_codes_begin_anew() -> None:
    model, teacher = tokenizer_and_teacher(restart=0.5)
    model.started.fill_(True)
    model.shares.fill_(0.0)
    model.shares[0] = 1.0
    vectors = F.normalize(torch.randn(50, model.config.code_width), dim=1)
    teacher.remember(vectors, torch.zeros(50, dtype=torch.int64))
    teacher.update(model)
    assert all((vectors - code).norm(dim=1).min() < 1e-6 for code in model.codebook[1:])


def shared_update(rank: int, world: int) -> Tensor:
    model, teacher = tokenizer_and_teacher()
    data = pictures(8)[rank * 8 // world : (rank + 1) * 8 // world]
    for _ in range(2):
        model.losses(batch_of(data), teacher)
        teacher.update(model)
    return model.codebook.clone()


def test_codebook_is_one_over_ranks() -> None:
    alone = shared_update(0, 1)
    for codebook in run_ranks(2, shared_update, 2):
        torch.testing.assert_close(codebook, alone)


def test_kmeans_finds_clusters() -> None:
    centres = F.normalize(torch.eye(4), dim=1)
    noise = 0.05 * torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    found = kmeans(F.normalize(centres.repeat(100, 1) + noise, dim=1), 4, 10)
    assert (found @ centres.T).amax(1).min() > 0.99
    assert kmeans(centres, 8, 3).shape == (8, 4)


def test_teachers_that_do_not_fit() -> None:
    source = clip_tiny().build()
    with pytest.raises(ValueError, match="teacher_width is 32"):
        replace(vqkd_tiny(), teacher_width=32).build().make_teacher(source)
    with pytest.raises(ValueError, match="none is named"):
        vqkd_tiny().build().make_teacher(None)
    with pytest.raises(ValueError, match="DVae has none"):
        vqkd_tiny().build().make_teacher(dvae_tiny().build())
    assert isinstance(DVae(dvae_tiny()), TokenizesImages)
