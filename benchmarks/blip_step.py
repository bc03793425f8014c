"""One pre-training step of BLIP (ITC, ITM, LM, with the momentum teacher): imglish against transformers, same weights.

    python -m benchmarks.blip_step --threads 2 --batch 4
    python -m benchmarks.blip_step --device cuda --batch 64

transformers has BLIP's modules and no pre-training; the peer is these modules in the official order of work: texts
padded to the longest of the batch, and to 30 as the official code has it, the matching text encoded again for positives
and negatives. Both use the same ITC and draw the same negatives. Forward and backward, no optimiser, no dropout.
bfloat16 is autocast over float32 weights for both; the difference is that of the summed losses in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.blip_models import Pair, Peer, batch_of, build_pair, captions, padded, pictures
from benchmarks.common import H200_BF16_PEAK, arguments, machine, measure, megabytes, milliseconds, table
from imglish.data.batch import Batch
from imglish.objectives.itm import draw_negatives, negative_weights
from imglish.objectives.momentum import MomentumTeacher, distilled_itc
from imglish.training.cost import flop_counter


class Official:
    """The published order of work on the peer's modules."""

    def __init__(self, peer: Peer, teacher: MomentumTeacher[Any], openings: tuple[int, int], device: str) -> None:
        self.peer, self.teacher, self.device = peer, teacher, device
        self.decode_id, self.encode_id = openings
        self.copy = copy.deepcopy(peer.retrieval).requires_grad_(False)

    def features(self, model: Any, images: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = model.vision_model(images).last_hidden_state
        cls = model.text_encoder(**given).last_hidden_state[:, 0]
        image, text = model.vision_proj(tokens[:, 0]), model.text_proj(cls)
        return tokens, F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def matched(self, given: dict[str, Tensor], tokens: Tensor) -> Tensor:
        states = self.peer.retrieval.text_encoder(**given, encoder_hidden_states=tokens).last_hidden_state
        logits: Tensor = self.peer.retrieval.itm_head(states[:, 0])
        return logits

    def loss(self, batch: Batch, sequences: list[list[int]], length: int, temperature: Tensor) -> Tensor:
        images, count = batch.squares, len(batch)
        given = padded(sequences, length, self.device)
        tokens, image, text = self.features(self.peer.retrieval, images, given)
        with torch.no_grad():
            _, image_m, text_m = self.features(self.copy, images, given)
        itc = distilled_itc(image, text, image_m, text_m, batch.image_ids, temperature, self.teacher)
        ids = batch.image_ids
        pictures = draw_negatives(negative_weights(itc.t2i[:, :count], ids, ids), batch.draws[:, 0])
        texts = draw_negatives(negative_weights(itc.i2t[:, :count], ids, ids), batch.draws[:, 1])
        opened = padded(sequences, length, self.device, self.encode_id)
        negative = {name: torch.cat([value, value[texts]]) for name, value in opened.items()}
        known = self.matched(opened, tokens)
        drawn = self.matched(negative, torch.cat([tokens[pictures], tokens]))
        labels = torch.zeros(3 * count, dtype=torch.int64, device=tokens.device)
        labels[:count] = 1
        itm = F.cross_entropy(torch.cat([known, drawn]).float(), labels)
        written = padded(sequences, length, self.device, self.decode_id)
        targets = written["input_ids"].masked_fill(written["attention_mask"] == 0, -100)
        lm = self.peer.text_decoder(**written, encoder_hidden_states=tokens, labels=targets).loss
        total: Tensor = itc.loss + itm + lm.float()
        return total


def forms(pair: Pair, batch: Batch, sequences: list[list[int]], device: str) -> dict[str, Callable[[], Tensor]]:
    """Name -> the summed loss of a step."""
    ours, config = pair.ours, pair.ours.config
    teacher = ours.make_teacher()
    assert teacher is not None
    teacher.at(2.0)
    peer = Official(pair.peer, teacher, (config.decode_id, config.encode_id), device)

    def packed() -> Tensor:
        losses = ours.losses(batch, teacher)
        return torch.stack([v.float() for k, v in losses.items() if not k.startswith("metric/")]).sum()

    def official(length: int) -> Callable[[], Tensor]:
        return lambda: peer.loss(batch, sequences, length, ours.temperature)

    return {
        "transformers, padded to 30": official(30),
        "transformers, padded to longest": official(max(map(len, sequences))),
        "imglish, packed": packed,
    }


def step(loss: Callable[[], Tensor], models: tuple[nn.Module, ...], device: str, dtype: str) -> None:
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        value = loss()
    value.backward()
    for model in models:
        model.zero_grad(set_to_none=True)


def flops(loss: Callable[[], Tensor], models: tuple[nn.Module, ...]) -> int:
    with flop_counter() as counter:
        loss().backward()
    for model in models:
        model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="blip-base")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = build_pair(options.model, options.size, options.device)
    models = pair.ours.train(), pair.peer.train()
    sequences = captions(options.batch, pair.ours.config.vocab_size)
    batch = batch_of(sequences, pictures(options.batch, options.size, options.device))
    contenders = forms(pair, batch, sequences, options.device)
    print(f"Step of {options.model} at {options.size} px, {options.batch} pairs; {machine(options.device)}\n")
    with torch.no_grad():
        losses = {name: loss().item() for name, loss in contenders.items()}
    work = {name: flops(loss, models) for name, loss in contenders.items()}
    first = next(iter(contenders))
    rows = []
    for dtype in options.dtype:
        calls = {n: lambda f=f, d=dtype: step(f, models, options.device, d) for n, f in contenders.items()}
        results = measure(calls, options.repeats, options.device)
        for name, result in results.items():
            mfu = f"{work[name] / result.seconds / H200_BF16_PEAK:.1%}" if options.device == "cuda" else "-"
            speed = f"{results[first].seconds / result.seconds:.2f}x"
            cost = f"{work[name] / options.batch / 1e9:.0f}"
            error = f"{abs(losses[name] - losses[first]):.0e}"
            time = milliseconds(result.seconds)
            rows.append([dtype, name, time, speed, cost, mfu, megabytes(result.peak), error])
    print(table(["dtype", "by", "time", "speed", "GFLOP/pair", "MFU", "peak memory", "difference"], rows))


if __name__ == "__main__":
    main()
