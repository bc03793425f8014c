from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from imglish.data.batch import TextBatch
from imglish.data.records import Record
from imglish.evaluation.encoding import Machine
from imglish.evaluation.metrics import recalls
from imglish.evaluation.retrieval import RetrievalConfig, RetrievalResult, evaluate_retrieval
from imglish.evaluation.summary import retrieval_report
from imglish.models.registry import named
from tests.evaluation.fakes import Fusion, OneStream, Towers, Words, a_set
from tests.ranks import run_ranks


def _machine(**changes: object) -> Machine:
    return Machine(**({"image_block": 7, "text_block": 11, "pair_block": 40, "progress": False} | changes))  # type: ignore[arg-type]


def _config(rerank: int, **changes: object) -> RetrievalConfig:
    return RetrievalConfig(**({"rerank": rerank, "machine": _machine()} | changes))  # type: ignore[arg-type]


def _load(pixels: dict[int, Tensor]) -> Callable[[Record], Tensor]:
    return lambda record: pixels[record.image_id]


def _run(model: Towers, config: RetrievalConfig, **of_set: int) -> RetrievalResult:
    records, pixels = a_set(model, **of_set)
    return evaluate_retrieval(model, Words(), records, config, _load(pixels))


def _dense(model: Fusion, records: list[Record], pixels: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tower scores and ITM logits of every pair ``(I, T)``, and the owner of each caption, by one call each."""
    captions = [c for r in records for c in r.captions]
    owner = torch.tensor([i for i, r in enumerate(records) for _ in r.captions])
    with torch.no_grad():
        images = model.encode_images(torch.stack([pixels[r.image_id] for r in records]))
        texts = model.encode_texts(TextBatch.of(Words().encode(captions)))
        pairs = [(i, t) for i in range(len(records)) for t in range(len(captions))]
        assert images.tokens is not None
        logits = model.match(model.project_images(images.tokens), texts, *map(list, zip(*pairs)))
    return images.features @ texts.features.T, logits[:, 1].view(len(records), -1), owner


def test_a_model_without_towers_reads_every_pair(tmp_path: Path) -> None:
    model = OneStream()
    records, pixels = a_set(model.inner, count=20)
    held = evaluate_retrieval(model, Words(), records, _config(4, sweep=(2,)), _load(pixels))
    assert (held.towers, held.tower_lists, held.sweep, held.image_to_image) == (None, None, {}, None)
    assert held.pairs == model.calls["pairs"] == 20 * 40
    captions = [c for r in records for c in r.captions]
    owner = torch.tensor([i for i, r in enumerate(records) for _ in r.captions])
    with torch.no_grad():
        scores = []
        for block in range(0, 20, 7):  # the fake picture's length depends on its place in the block
            images = model.embed_images(torch.stack([pixels[r.image_id] for r in records[block : block + 7]]))
            texts = model.embed_texts(TextBatch.of(Words().encode(captions)))
            pairs = [(i, t) for i in range(len(images.features)) for t in range(40)]
            logits = model.match(model.project_images(images.tokens), texts, *map(list, zip(*pairs)))
            scores.append(logits[:, 1].view(-1, 40))
    assert held.best == pytest.approx(recalls(torch.cat(scores), owner))
    assert "read every pair, 800" in held.text()
    assert "all pairs" in held.text()
    assert "towers  " not in held.text()
    spilled = _config(0, machine=_machine(token_memory=1))
    assert evaluate_retrieval(model, Words(), records, spilled, _load(pixels)).best == held.best
    few = replace(_config(0), all_pairs_limit=700)
    with pytest.raises(ValueError, match=r"no towers.*800 pairs.*fewer pictures"):
        evaluate_retrieval(model, Words(), records, few, _load(pixels))
    drawn = [replace(record, image=lambda: Image.new("RGB", (9, 5))) for record in records]
    retrieval_report(held, drawn, "Every pair", {}).save(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_towers_encode_each_picture_and_caption_once() -> None:
    model = Fusion()
    result = _run(model, _config(4), count=30, per_picture=2)
    assert model.calls["pictures"] == 30
    assert model.calls["captions"] == 60
    assert result.pairs == model.calls["pairs"] <= 30 * 4 + 60 * 4  # each pair once, whoever asks for it
    assert model.calls["projected"] == 30  # keys and values once a picture, for both directions
    assert model.calls["largest call"] <= 40


def test_towers_and_all_pairs_equal_the_dense_scores() -> None:
    model = Fusion()
    records, pixels = a_set(model)
    cosine, logit, owner = _dense(model, records, pixels)
    result = evaluate_retrieval(model, Words(), records, _config(0, all_pairs=True), _load(pixels))
    assert result.towers == pytest.approx(recalls(cosine, owner))
    assert result.reranked == pytest.approx(recalls(logit, owner))
    assert result.reranked["t2i_r1"] > result.towers["t2i_r1"]  # or this set shows nothing
    assert result.pairs == 30 * 60


def test_only_the_first_k_are_reordered_and_stay_above_the_rest() -> None:
    model = Fusion()
    records, pixels = a_set(model)
    cosine, logit, owner = _dense(model, records, pixels)

    def official(scores: Tensor, fused: Tensor, k: int) -> Tensor:
        where = scores.topk(k, 1).indices
        return (scores - 1000).scatter(1, where, fused.gather(1, where))

    result = evaluate_retrieval(model, Words(), records, _config(6, sweep=(2, 4, 6, 50)), _load(pixels))
    for k, table in {**result.sweep, 6: result.reranked}.items():
        scores_t2i = official(cosine.T, logit.T, k)
        assert table == pytest.approx(recalls(official(cosine, logit, k), owner, scores_t2i=scores_t2i))
    assert sorted(result.sweep) == [2, 4]
    assert result.reranked_lists is not None
    assert torch.equal(result.reranked_lists.found[:, 0], official(cosine.T, logit.T, 6).argmax(1))
    assert torch.equal(result.tower_lists.found[:, 0], cosine.T.argmax(1))


def test_score_rules_differ_as_they_say() -> None:
    model = Fusion()
    records, pixels = a_set(model)
    cosine, logit, owner = _dense(model, records, pixels)
    for rule, scores in (("itm", logit), ("itm_probability", logit * 0.5), ("itm+itc", logit + cosine)):
        config = _config(0, all_pairs=True, score_rule=rule)
        result = evaluate_retrieval(model, Words(), records, config, _load(pixels))
        assert result.reranked == pytest.approx(recalls(scores, owner)), rule


@pytest.mark.parametrize("changes", [{"image_block": 64, "text_block": 500, "pair_block": 5}, {"token_memory": 0}])
def test_the_result_does_not_depend_on_blocks_or_on_memory(changes: dict[str, int]) -> None:
    one = _run(Fusion(), _config(5))
    other = _run(Fusion(), _config(5, machine=_machine(**changes)))
    assert other.towers == pytest.approx(one.towers)
    assert other.reranked == pytest.approx(one.reranked)
    assert any("disk" in note for note in other.notes) == ("token_memory" in changes)


def test_tokens_kept_as_bfloat16_are_rounded_only() -> None:
    exact = _run(Fusion(), _config(0, all_pairs=True))
    rounded = _run(Fusion(), _config(0, all_pairs=True, machine=_machine(token_dtype="bfloat16")))
    assert rounded.reranked is not None
    assert rounded.reranked["r_mean"] == pytest.approx(exact.best["r_mean"], abs=5)


def test_k_is_clamped_to_the_set_and_said() -> None:
    result = _run(Fusion(), _config(1000))
    assert result.rerank == 60
    assert result.pairs == 30 * 60
    assert any("clamped to the set: 30 pictures, 60 captions" in note for note in result.notes)


def test_a_model_without_fusion_gives_towers_and_says_so() -> None:
    result = _run(Towers(), _config(8))
    assert result.reranked is None
    assert result.best == result.towers
    assert any("no fusion tower" in note for note in result.notes)


def test_searching_pictures_by_pictures_and_captions_by_captions() -> None:
    model = Fusion()
    records, pixels = a_set(model)
    grouped = [replace(r, group=f"g{i // 2}") if i < 20 else r for i, r in enumerate(records)]
    result = evaluate_retrieval(model, Words(), grouped, _config(0), _load(pixels))
    assert result.image_to_image is not None
    assert result.image_to_image["i2i_queries"] == 20
    assert result.text_to_text is not None
    assert result.text_to_text["t2t_r10"] > 50  # its sister caption shares all words but one
    alone = _run(model, _config(0), per_picture=1)
    assert alone.image_to_image is None
    assert alone.text_to_text is None


def test_records_of_one_picture_are_one_picture() -> None:
    model = Fusion()
    records, pixels = a_set(model)
    split = [Record(r.key, r.image, (c,), r.image_id) for r in records for c in r.captions]
    whole = evaluate_retrieval(model, Words(), records, _config(4), _load(pixels))
    assert evaluate_retrieval(model, Words(), split, _config(4), _load(pixels)).to_dict()["reranked"] == whole.reranked


def test_the_result_as_json_and_as_a_table() -> None:
    result = _run(Fusion(), _config(6, sweep=(2,)))
    held = json.loads(result.to_json())
    assert held["towers"]["t2i_r1"] == result.towers["t2i_r1"]
    assert held["rerank"] == 6
    text = result.text()
    assert "reranked, first 6" in text
    assert "reranked, first 2" in text
    assert f"{result.towers['t2i_r5']:.1f}" in text


def test_settings_that_cannot_work_are_refused() -> None:
    for changes in ({"rerank": -1}, {"ks": ()}, {"sweep": (0,)}, {"ties": "coin"}, {"score_rule": "sum"}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            RetrievalConfig(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_block"):
        Machine(image_block=0)
    with pytest.raises(ValueError, match="all_pairs_limit"):
        _run(Fusion(), _config(0, all_pairs=True, all_pairs_limit=10))
    with pytest.raises(ValueError, match="no records"):
        evaluate_retrieval(Fusion(), Words(), [], _config(0))


def test_the_mode_of_the_model_is_put_back() -> None:
    model = Fusion()
    model.train()
    _run(model, _config(2))
    assert model.training


def _measured(rank: int = 0) -> dict[str, object]:
    found: dict[str, object] = json.loads(_run(Fusion(), _config(5, sweep=(2,)), count=37).to_json())
    return {**found, "seconds": None}


def test_two_processes_measure_what_one_measures() -> None:
    assert run_ranks(2, _measured) == [_measured(), _measured()]


def test_a_real_albef_is_reranked_as_pair_by_pair() -> None:
    torch.manual_seed(0)
    model = named("albef-tiny").build().eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (6, 3, 48, 48), generator=generator, dtype=torch.uint8)
    texts = [" ".join(f"w{1 + (3 * i + j) % 40}" for j in range(2 + i % 5)) for i in range(12)]
    records = [Record(f"p{i}", b"", (texts[2 * i], texts[2 * i + 1]), i) for i in range(6)]
    config = _config(0, all_pairs=True, score_rule="itm_probability", machine=_machine(image_block=4, pair_block=7))
    result = evaluate_retrieval(model, Words(), records, config, lambda record: pixels[record.image_id])

    scores = torch.zeros(6, 12)
    with torch.no_grad():
        for i in range(6):
            memory = model.project_images(model.encode_images(pixels[i : i + 1]).tokens)
            for t in range(12):
                text = model.encode_texts(TextBatch.of(Words().encode([texts[t]])))
                logits = model.match(memory, text, [0], [0])[0]
                scores[i, t] = logits[1] - logits[0]
    owner = torch.arange(12) // 2
    assert result.reranked_lists is not None
    assert torch.equal(result.reranked_lists.found[:, 0], scores.argmax(0))
    best = scores.max(0).values
    assert torch.allclose(result.reranked_lists.score[:, 0], best, atol=1e-5)
    with pytest.warns(UserWarning, match="always 100"):
        assert result.reranked == pytest.approx(recalls(scores, owner))
    assert any("R@10 over 6 candidates" in note for note in result.notes)
