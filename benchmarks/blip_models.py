"""BLIP of transformers and of imglish with the same weights, and inputs for both.

The peer's modules come from its retrieval model and its text decoder; what the published model shares between encoder
and decoder (all but self-attention) is one set of modules there too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from imglish.checkpoints import hf_blip
from imglish.checkpoints.blip import Parts
from imglish.data.batch import Batch, TextBatch
from imglish.models import registry
from imglish.models.blip import Blip, BlipConfig

CLS, SEP = 2, 3


@dataclass(frozen=True)
class Pair:
    """Both models with the same weights."""

    ours: Blip
    peer: Peer


class Peer(nn.Module):
    """The modules of transformers' BLIP, arranged as in pre-training."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        encoder = transformers.BlipForImageTextRetrieval(config)
        decoder = transformers.BlipForConditionalGeneration(config).text_decoder
        decoder.bert.embeddings = encoder.text_encoder.embeddings
        for theirs, shared in zip(decoder.bert.encoder.layer, encoder.text_encoder.encoder.layer, strict=True):
            theirs.crossattention, theirs.intermediate, theirs.output = (
                shared.crossattention,
                shared.intermediate,
                shared.output,
            )
        decoder.cls.predictions.decoder.weight = encoder.text_encoder.embeddings.word_embeddings.weight
        self.retrieval, self.text_decoder = encoder, decoder

    def official_state(self) -> dict[str, Tensor]:
        """State under the names that the conversion knows."""
        state = {name.removeprefix("retrieval."): value for name, value in self.state_dict().items()}
        head = "text_decoder.cls.predictions"
        return state | {f"{head}.decoder.bias": state[f"{head}.bias"]}


def build_pair(name: str, size: int, device: str) -> Pair:
    """The configuration called ``name`` at ``size`` pixels a side; no dropout."""
    ours = registry.named(name)
    assert isinstance(ours, BlipConfig)
    ours = replace(ours, dropout=0.0, vision=replace(ours.vision, image=replace(ours.image, size=size)))
    vision, text = ours.vision, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text |= {"vocab_size": ours.vocab_size, "max_position_embeddings": ours.max_length, "label_smoothing": 0.1}
    text |= {"hidden_size": ours.width, "num_hidden_layers": ours.depth, "num_attention_heads": ours.heads}
    text |= {"intermediate_size": ours.hidden, "encoder_hidden_size": vision.width, "layer_norm_eps": ours.norm_eps}
    text |= {"bos_token_id": ours.decode_id, "eos_token_id": SEP, "sep_token_id": SEP, "pad_token_id": 0}
    config = transformers.BlipConfig(
        vision_config={
            "image_size": size,
            "patch_size": vision.patch,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "layer_norm_eps": vision.norm_eps,
        },
        text_config=text,
        image_text_hidden_size=ours.embed_dim,
    )
    torch.manual_seed(0)
    peer = Peer(config)
    with torch.no_grad():  # wider than at the start of training, so that an error would show
        for parameter in peer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5)
    made = replace(hf_blip.config_from_json(config.to_dict()), teacher=replace(ours.teacher, queue_size=0))
    model = made.build()
    state = hf_blip.table(made, Parts(temperature=False)).convert(peer.official_state(), model.state_dict()).state
    model.load_state_dict(state)
    return Pair(model.to(device), peer.to(device))


def captions(count: int, vocab_size: int, shortest: int = 8, longest: int = 18) -> list[list[int]]:
    """Token ids of ``count`` captions with [CLS] and [SEP]; about 13 tokens on average, as COCO captions have."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [[CLS, *torch.randint(4, vocab_size - 2, (n - 2,), generator=generator).tolist(), SEP] for n in lengths]


def padded(sequences: list[list[int]], length: int, device: str, opening: int = CLS) -> dict[str, Tensor]:
    """The peer's input: ids that begin with ``opening``, filled up to ``length`` with 0, and which are real."""
    ids = torch.tensor([[opening, *s[1:]] + [0] * (length - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def pictures(count: int, size: int, device: str) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2)).to(device)


def batch_of(sequences: list[list[int]], images: Tensor) -> Batch:
    draws = torch.rand(len(sequences), 2, generator=torch.Generator().manual_seed(3))
    return Batch(images, TextBatch.of(sequences), torch.arange(len(sequences)), draws).to(images.device)
