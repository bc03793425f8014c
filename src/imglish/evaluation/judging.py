"""Captions judged by a model that sees the picture, without references: CLIPScore, and the matching probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from imglish.data.records import Record
from imglish.evaluation.encoding import Encodes, Machine
from imglish.evaluation.pairs import score_pairs
from imglish.evaluation.retrieval import record_loader

CLIP_SCALE = 2.5  # Hessel et al. 2021, section 3: so that usual cosines come to lie between 0 and 1


@dataclass(frozen=True)
class Judge:
    """A model with towers, a fusion, or both; its opinion is worth what the model is worth."""

    model: nn.Module
    tokenizer: Encodes

    @staticmethod
    def load(name: str | Path, device: torch.device) -> Judge:
        """The exported model ``name``; raises ``CheckpointError``."""
        from imglish.checkpoints.native import load

        loaded = load(name)
        return Judge(loaded.model.to(device), loaded.tokenizer)

    def scores(self, records: Sequence[Record], captions: Sequence[str], machine: Machine) -> dict[str, list[float]]:
        """Of caption n and the picture of record n: ``clip_score``, 2.5 times the cosine and at least 0 (Hessel et al.
        2021, CLIPScore), by towers; ``match``, the probability that they belong together, by a fusion."""
        own = torch.arange(len(records))
        load = record_loader(self.model)
        scored = score_pairs(self.model, self.tokenizer, records, captions, own, own, load, machine, "itm_probability")
        found = {}
        if scored.towers is not None:
            found["clip_score"] = (CLIP_SCALE * scored.towers.clamp(min=0)).tolist()
        if scored.fusion is not None:  # the difference of both logits
            found["match"] = scored.fusion.sigmoid().tolist()
        return found
