"""How deep a parameter lies: which layers follow each other in the models here, for layer-wise learning rates.

A module that has layers has a line in :data:`STACKS`; a model is the modules that it is made of, so a task model needs
no line of its own unless it adds layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from imglish.models.albef import Albef
from imglish.models.answering import AnswerDecoder
from imglish.models.beit import BeitBody
from imglish.models.beit_heads import BeitClassifier
from imglish.models.blip import Blip
from imglish.models.blip_heads import BlipReasoning
from imglish.models.coca import Coca
from imglish.models.multiway import Multiway
from imglish.models.text_towers import BertTower, GruTower, TextTower
from imglish.models.vilt import Vilt
from imglish.models.vit import VisionTransformer
from imglish.models.vlmo_body import VlmoBody
from imglish.nn.efficientnet import EfficientNet
from imglish.nn.resnet import ModifiedResNet


@dataclass(frozen=True)
class Stack:
    """inputs: modules and parameters below the first layer; layers: lists of layers, one above the other, or a module
    that counts as one layer. Names are those within the module."""

    inputs: tuple[str, ...]
    layers: tuple[str, ...]


_PICTURE = ("patch_embed", "class_token", "mask_token", "positions")
STACKS: tuple[tuple[type[nn.Module], tuple[Stack, ...]], ...] = (
    (Albef, (Stack(("embedding",), ("text_layers", "fusion_layers")),)),
    (Blip, (Stack(("embedding",), ("layers",)), Stack((), ("decoder",)))),
    (AnswerDecoder, (Stack(("embedding",), ("layers",)),)),
    (BlipReasoning, (Stack((), ("second",)), Stack((), ("merge",)))),
    (Coca, (Stack(("text.words", "text.positions", "text.cls"), ("text.blocks", "layers")),)),
    (Vilt, (Stack(("embedding", "pictures", "types"), ("blocks",)),)),
    (VlmoBody, (Stack((*_PICTURE, "embedding", "types"), ("blocks",)),)),
    (BeitBody, (Stack(_PICTURE, ("blocks",)),)),
    (BeitClassifier, (Stack((), ("body.relative",)),)),
    (Multiway, (Stack((*_PICTURE, "words", "image_positions", "text_positions"), ("blocks",)),)),
    (VisionTransformer, (Stack((*_PICTURE, "norm_before"), ("blocks",)),)),
    (ModifiedResNet, (Stack(("stem",), ("stages",)),)),
    (EfficientNet, (Stack(("stem",), ("blocks",)),)),
    (TextTower, (Stack(("words", "positions"), ("blocks",)),)),
    (BertTower, (Stack(("embedding",), ("blocks",)),)),
    (GruTower, (Stack(("words",), ("gru",)),)),
)


def depths(model: nn.Module) -> dict[str, int]:
    """For every parameter the number of steps down from the output: 1 in the last layer of its stack, 2 in the one
    below it, and one more than the first layer's in what lies below that; 0 in heads, final norms and the tables of
    relative positions that all layers share (as BEiT's code has it).

    Each tower counts from its own top. A model in which nothing has layers gives only zeros.
    """
    prefixes: dict[str, int] = {}
    for path, module in model.named_modules():
        for stack in (stack for kind, stacks in STACKS if isinstance(module, kind) for stack in stacks):
            start = f"{path}." if path else ""
            layers = [f"{start}{name}" for name in _layers(module, stack)]
            levels = {name: len(layers) - number for number, name in enumerate(layers)}
            levels |= {f"{start}{name}": len(layers) + 1 for name in stack.inputs}
            prefixes |= {name: level for name, level in levels.items() if name not in prefixes}
    found = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    for name in found:
        pieces = name.split(".")
        for length in range(len(pieces), 0, -1):
            if (prefix := ".".join(pieces[:length])) in prefixes:
                found[name] = prefixes[prefix]
                break
    return found


def _layers(module: nn.Module, stack: Stack) -> Iterator[str]:
    for name in stack.layers:
        part = module.get_submodule(name)
        if isinstance(part, (nn.ModuleList, nn.Sequential)):
            yield from (f"{name}.{number}" for number in range(len(part)))
        else:
            yield name
