"""VLMo's step on real processes against the official one: losses, negatives, and gradients before they are averaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from imglish.objectives.gather import gather, world_size
from imglish.objectives.itm import negative_weights
from imglish.training.step import split
from tests.golden.aligned import draws_for
from tests.golden.support import Case, cases, check_grad_norms
from tests.golden.test_vlmo import batch_of, build, gradients
from tests.ranks import run_ranks


def own_first(rank: int, world: int, count: int) -> np.ndarray:
    """Global numbers in the official order: this rank's samples, then those of the others."""
    everyone = np.arange(world * count).reshape(world, count)
    return np.concatenate([everyone[rank], *np.delete(everyone, rank, axis=0)])


def step(rank: int, path: Path, world: int) -> dict[str, Tensor | dict[str, Tensor | None]]:
    case = Case(path)
    model = build(case)
    model.config = replace(model.config, own_features_only=True)
    batch = split(batch_of(case.inputs), world)[rank]
    count, width = len(batch), model.config.embed_dim
    embedded = model.embed(batch)
    image, text = embedded.image[:, :width], embedded.text[:, :width]
    i2t, t2i = (model.logit_scale.exp() * a @ gather(b).T for a, b in ((image, text), (text, image)))
    texts, pictures = (negative_weights(x, batch.image_ids, gather(batch.image_ids)) for x in (i2t, t2i))
    order = torch.from_numpy(own_first(rank, world, count))
    drawn = [order[case.outputs[name][rank]] for name in ("neg_image_for_text", "neg_text_for_image")]
    batch = replace(batch, draws=torch.stack([draws_for(pictures, drawn[0]), draws_for(texts, drawn[1])], dim=1))

    losses = model.losses(batch)
    assert batch.masked is not None
    mine = torch.tensor(float(len(batch.masked.labels)))
    share = gather(mine[None]).sum() / (mine * world_size())  # ours is a share of the mean over all ranks
    losses["mlm"] = losses["mlm"] * share
    total = torch.stack([value for name, value in losses.items() if not name.startswith("metric/")]).sum()
    total.backward()
    negatives = model._draw(embedded, batch.draws)
    return {
        "itc_loss": losses["itc"].detach(),
        "itm_loss": losses["itm"].detach(),
        "mlm_loss": losses["mlm"].detach(),
        "total_loss": total.detach(),
        "itm_weights_t2i": pictures[:, order],
        "itm_weights_i2t": texts[:, order],
        "drawn": torch.from_numpy(negatives.chosen.numpy()[rank].copy()) - torch.stack(drawn),
        "itm_logits": model._itm_logits(
            torch.cat(
                [
                    model._known_pairs(batch, embedded.towers)[0],
                    model._negative_pairs(negatives, batch, embedded.towers),
                ]
            )
        ).detach(),
        "gradients": gradients(case, model),
    }


@pytest.mark.parametrize("path", cases("vlmo-pretrain-2ranks"), ids=lambda p: p.name)
def test_step_on_processes(path: Path) -> None:
    case = Case(path)
    world = len(case.outputs["total_loss"])
    results = run_ranks(world, step, path, world)
    for rank, found in enumerate(results):
        for name in ("itc_loss", "itm_loss", "mlm_loss", "total_loss", "itm_logits"):
            torch.testing.assert_close(found[name], case.outputs[name][rank], rtol=1e-4, atol=1e-5, msg=name)
        for name in ("itm_weights_t2i", "itm_weights_i2t"):
            expected = case.outputs[name][rank]
            torch.testing.assert_close(found[name], expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)
        assert not found["drawn"].any()
        buffers = case.meta["buffers_kept"]
        norms = {name: v for name, v in case.meta["grad_norms_per_rank"][rank].items() if name not in buffers}
        check_grad_norms(case, norms, found["gradients"])
