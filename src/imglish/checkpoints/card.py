"""A page about a model for the hub, made from what the checkpoint says of itself, and nothing beyond."""

from __future__ import annotations

import json
from typing import Any

import yaml

from imglish.checkpoints.native import Loaded
from imglish.models.heads import TaskModel

_LAYOUTS = {
    "imglish": 'import imglish\n\nmodel = imglish.load("hf:{name}")',
    "transformers": 'from transformers import AutoModel, AutoTokenizer\n\nmodel = AutoModel.from_pretrained("{name}")',
}


def model_card(loaded: Loaded, name: str, layout: str = "imglish", licence: str | None = None) -> str:
    """Markdown with the front matter of the hub. name: OWNER/NAME; layout: of the folder; licence: of the weights,
    which only who publishes them can know."""
    config, meta = loaded.config, loaded.meta
    front = {"library_name": layout, "tags": ["vision-language", config.family]}
    if licence is not None:
        front["license"] = licence
    parameters = sum(p.numel() for p in loaded.model.parameters())
    facts = [f"family: {config.family}, {parameters / 1e6:.1f} M parameters"]
    if size := getattr(config.image, "size", None):
        facts.append(f"pictures: {size} pixels, mean {_numbers(config.image.mean)}, std {_numbers(config.image.std)}")
    if loaded.words is not None:
        facts.append(f"texts: {loaded.words.vocab_size} tokens, at most {config.max_length} a text")
    if isinstance(loaded.model, TaskModel):
        facts.append(f"task: {loaded.model.head.task}, {len(loaded.model.head.classes)} answers")
    facts.append(f"pairs are ranked by: {loaded.score_rule}")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---",
        f"# {name.rpartition('/')[2]}",
        "\n".join(f"- {fact}" for fact in facts),
        "## Use\n\n```python\n" + _LAYOUTS[layout].format(name=name) + "\n```",
        *_origin(meta),
    ]
    return "\n\n".join(parts) + "\n"


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _origin(meta: dict[str, Any]) -> list[str]:
    """Sections on where the weights come from and how good they are, as far as that is known."""
    sections = []
    if source := meta.get("from"):
        sections.append(
            f"## Origin\n\nConverted from `{source['name']}` ({source['format']}), SHA-256 `{source['sha256']}`."
        )
    if recipe := meta.get("recipe"):
        text = yaml.safe_dump(json.loads(json.dumps(recipe)), sort_keys=False)
        sections.append(f"## Training\n\nStep {meta.get('step')} of this recipe:\n\n```yaml\n{text}```")
    if best := meta.get("best"):
        rows = [("towers", best.get("towers")), ("reranked", best.get("reranked"))]
        lines = [f"| {name} | {_scores(found)} |" for name, found in rows if found]
        if lines:
            table = "\n".join(["| | recall, % |", "|---|---|", *lines])
            sections.append(f"## Validation\n\nOn the held-out pairs of the recipe:\n\n{table}")
    if not sections:
        sections.append("## Origin\n\nThe checkpoint does not say where it comes from.")
    return sections


def _scores(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in found.items() if name.endswith(("_r1", "_r5", "_r10")))
