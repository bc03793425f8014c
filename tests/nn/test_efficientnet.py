"""EfficientNet: published sizes, TensorFlow's padding, and the same numbers as transformers' ALIGN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imglish.nn.efficientnet import EfficientNet, _Convolution

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("factors", "published"),
    [((1.0, 1.0), 5_288_548), ((1.8, 2.6), 43_040_704), ((2.0, 3.1), 66_347_960)],
    ids=["b0", "b6", "b7"],
)
def test_published_parameter_counts(factors: tuple[float, float], published: int) -> None:
    """With the classifier of 1000 classes, which is not built."""
    with torch.device("meta"):
        network = EfficientNet(*factors, 1280, ZERO, ONE)
    assert sum(p.numel() for p in network.parameters()) + 1001 * network.outputs - network.outputs + 1000 == published


@pytest.mark.parametrize("side", [7, 8, 9, 10])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_padding_keeps_every_cell(side: int, kernel: int, stride: int) -> None:
    out = _Convolution(1, 2, kernel, stride)(torch.zeros(2, 1, side, side))
    assert out.shape[2:] == (-(-side // stride), -(-side // stride))


def shaken(network: torch.nn.Module) -> None:
    """Away from the initial weights and statistics."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.dim() == 1:
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)


def test_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AlignVisionConfig(width_coefficient=0.5, depth_coefficient=0.6, image_size=64)
    theirs = transformers.AlignVisionModel(config).eval()
    shaken(theirs)
    ours = EfficientNet(0.5, 0.6, None, ZERO, ONE).eval()
    official = [v for k, v in theirs.state_dict().items() if "num_batches" not in k]
    mine = {k: v for k, v in ours.state_dict().items() if "num_batches" not in k}
    assert [v.shape for v in official] == [v.shape for v in mine.values()]
    ours.load_state_dict(ours.state_dict() | dict(zip(mine, official, strict=True)))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(images).pooler_output
    assert expected.std() > 1e-3
    torch.testing.assert_close(ours(images), expected.flatten(1), rtol=1e-4, atol=1e-5)


def test_bytes_are_normalised() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    network = EfficientNet(0.25, 0.3, None, mean, std).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    def column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values).view(3, 1, 1)

    torch.testing.assert_close(network(pixels), network((pixels / 255 - column(mean)) / column(std)))
