"""Official BLIP checkpoints: pre-training, retrieval (both with a momentum copy), matching, and captioning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from imglish.checkpoints import bert
from imglish.checkpoints.rules import Converted, Drop, Fresh, Rule, Table, Tie
from imglish.models.blip import OWN_PARTS, BlipConfig

_ENCODER, _DECODER = "text_encoder", "text_decoder.bert"


@dataclass(frozen=True)
class Parts:
    """What a checkpoint holds beside the vision Transformer.

    encoder: the text encoder with projections and ITM head (all but captioning checkpoints); decoder: the text decoder
    (pre-training, captioning); temperature: of the contrast (pre-training, retrieval).
    """

    encoder: bool = True
    decoder: bool = True
    temperature: bool = True

    @staticmethod
    def of(official: Mapping[str, Tensor]) -> Parts:
        return Parts(
            encoder=any(name.startswith(f"{_ENCODER}.") for name in official),
            decoder=any(name.startswith(f"{_DECODER}.") for name in official),
            temperature="temp" in official,
        )


def _encoder(suffix: str) -> Iterator[Rule | Drop]:
    yield from bert.embeddings(f"{_ENCODER}{suffix}.embeddings", "embedding", types=False)
    yield from bert.layer(f"{_ENCODER}{suffix}.encoder.layer.{{i}}", "layers.{i}", bert.PARTS)
    yield Rule(f"vision_proj{suffix}.{{leaf}}", "image_proj.{leaf}")
    yield Rule(f"text_proj{suffix}.{{leaf}}", "text_proj.{leaf}")


def _decoder(config: BlipConfig, encoder: bool) -> Iterator[Rule | Drop | Tie]:
    """The decoder's own weights; what it shares is tied to the encoder, or stands for it where there is none."""
    own = OWN_PARTS[config.share]
    words, layers = f"{_DECODER}.embeddings", f"{_DECODER}.encoder.layer.{{i}}"
    shared = [part for part in bert.PARTS if part not in own]
    if config.share == "none":
        yield from bert.embeddings(words, "decoder_embedding", types=False)
    elif encoder:
        yield Drop(f"{words}.position_ids", "counts up from zero")
        yield Tie(f"{words}.{{part}}.{{leaf}}", f"{_ENCODER}.embeddings.{{part}}.{{leaf}}")
    else:
        yield from bert.embeddings(words, "embedding", types=False)
    yield from bert.layer(layers, "decoder.{i}", own)
    if encoder:
        for part in shared:
            for name in (name for names, _ in bert.PARTS[part] for name in names):
                yield Tie(f"{layers}.{name}.{{leaf}}", f"{_ENCODER}.encoder.layer.{{i}}.{name}.{{leaf}}")
    else:
        yield from bert.layer(layers, "layers.{i}", shared)
    yield from bert.head("text_decoder.cls.predictions", f"{words}.word_embeddings.weight", "lm_head")


def _without_encoder(config: BlipConfig) -> Iterator[Fresh]:
    reason = "the checkpoint has a text decoder only"
    for part in OWN_PARTS[config.share]:
        for _, place in bert.PARTS[part]:
            yield Fresh(f"layers.{{i}}.{part}{place}.{{leaf}}", reason)
    if config.share == "none":
        yield Fresh("embedding.{part}.{leaf}", reason)
    for name in ("image_proj", "text_proj", "itm_head"):
        yield Fresh(f"{name}.{{leaf}}", reason)


def _without_decoder(config: BlipConfig) -> Iterator[Fresh]:
    reason = "the checkpoint has no text decoder"
    for part in OWN_PARTS[config.share]:
        for _, place in bert.PARTS[part]:
            yield Fresh(f"decoder.{{i}}.{part}{place}.{{leaf}}", reason)
    if config.share == "none":
        yield Fresh("decoder_embedding.{part}.{leaf}", reason)
    yield Fresh("lm_head.bias", reason)
    yield Fresh("lm_head.{part}.{leaf}", reason)


def table(config: BlipConfig, parts: Parts = Parts()) -> Table:
    """The student: official name -> ours."""
    momentum = bert.dropped(
        [*bert.vision("visual_encoder_m"), *_encoder("_m")], "the momentum copy, which training makes anew"
    )
    return Table(*bert.vision("visual_encoder"), *text_rules(config, parts), *momentum, *bert.QUEUE)


def text_rules(config: BlipConfig, parts: Parts) -> list[Rule | Drop | Tie | Fresh]:
    """All but the vision Transformer."""
    rules: list[Rule | Drop | Tie | Fresh] = []
    if parts.encoder:
        rules += [*_encoder(""), Rule("itm_head.{leaf}", "itm_head.{leaf}")]
    else:
        rules += _without_encoder(config)
    rules += _decoder(config, parts.encoder) if parts.decoder else _without_decoder(config)
    if parts.temperature:
        rules.append(Rule("temp", "temperature"))
    else:
        rules.append(Fresh("temperature", "the checkpoint was made without contrast, or for its use alone"))
    return rules


def teacher_table() -> Table:
    """The momentum copy of both towers: official ``*_m`` name -> ours. Its cross-attention is officially averaged too,
    and never used."""
    layers = f"{_ENCODER}_m.encoder.layer.{{i}}"
    return Table(
        *bert.dropped(bert.layer(layers, "", bert.CROSS), "the teacher never looks from text to picture"),
        *bert.vision("visual_encoder_m"),
        *_encoder("_m"),
        Fresh("temperature", "the teacher uses the student's"),
    )


def convert(official: Mapping[str, Tensor], target: Mapping[str, Tensor], config: BlipConfig) -> Converted:
    """The student's state dict, of the names and shapes of ``target``; errors name what does not fit."""
    return table(config, Parts.of(official)).convert(official, target)


def convert_teacher(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
    """The momentum copy's state dict; ``target``: that of the teacher's model."""
    copies = {name: value for name, value in official.items() if name.split(".")[0].endswith("_m")}
    return teacher_table().convert(copies, target)
