"""Searching: the same ranking as the evaluation, on the path that people use."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imglish.search
from imglish import cli
from imglish.cli.search import NO_MATCH, main
from imglish.data.sources import open_source
from imglish.evaluation.encoding import Machine
from imglish.evaluation.retrieval import RetrievalConfig, evaluate_retrieval
from imglish.nn.segments import Ragged, Segments
from imglish.search import manifest as manifests
from imglish.search.calibration import calibrate, calibration_error, fit, margins
from imglish.search.engine import Index
from imglish.search.filters import FilterError
from imglish.search.indexing import IndexConfig, index_records, prepare
from imglish.search.manifest import Calibration, ManifestError, dimension_of
from imglish.search.qdrant import QdrantStore
from imglish.search.query import Query
from imglish.search.store import open_store
from imglish.search.tokens import pack, unpack
from tests.search.samples import TEXTS, export_model, load_model, picture, write_pictures

COUNT = 30
MACHINE = Machine(progress=False)


def _photos(folder: Path) -> Path:
    """Pictures with a caption each; the path of their table."""
    names = write_pictures(folder, COUNT)
    words = " ".join(TEXTS).split()
    with (folder / "captions.jsonl").open("w") as file:
        for number, name in enumerate(names):
            chosen = np.random.default_rng(number).choice(words, 5)
            file.write(json.dumps({"image": name, "caption": " ".join(chosen)}) + "\n")
    return folder / "captions.jsonl"


def _index(photos: Path, where: Path, model_folder: Path, tokens: str = "") -> Path:
    model = load_model(model_folder)
    config = IndexConfig(progress=False, tokens=tokens, thumbnail=0 if tokens else 64)
    store = open_store(str(where), dimension_of(model))
    manifest = prepare(store, model, str(model_folder), config)
    index_records(store, model, open_source(str(photos), needs="pictures"), str(photos), manifest, config)
    return where


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Table of the pictures, model, index."""
    folder = tmp_path_factory.mktemp("search")
    photos = _photos(folder / "photos")
    model = export_model(folder / "albef")
    return photos, model, _index(photos, folder / "index", model)


@pytest.fixture(scope="module")
def index(made: tuple[Path, Path, Path]) -> Index:
    return imglish.search.open(made[2], device="cpu")


@pytest.mark.parametrize("rerank", [0, 8])
def test_recall_equals_that_of_the_evaluation(made: tuple[Path, Path, Path], rerank: int) -> None:
    records = open_source(str(made[0]))
    model = load_model(made[1])
    config = RetrievalConfig(rerank=rerank, ks=(1, 5, 10), score_rule="itm_probability", machine=MACHINE)
    expected = evaluate_retrieval(model.network, model.tokenizer, records, config)
    lists = expected.reranked_lists if rerank else expected.tower_lists
    assert lists is not None
    index = imglish.search.open(made[2], device="cpu", feed_from="originals")
    ranks = []
    for number, record in enumerate(records):
        found = index.search(record.captions[0], k=COUNT, rerank=rerank)
        keys = [hit.key for hit in found.hits]
        assert keys[: max(rerank, 3)][:3] == [records[int(i)].key for i in lists.found[number][:3]]
        ranks.append(keys.index(record.key))
    for k in (1, 5, 10):
        assert np.mean([rank < k for rank in ranks]) * 100 == pytest.approx(expected.best[f"t2i_r{k}"])


def test_the_reranked_stand_first_and_say_how_they_moved(index: Index) -> None:
    towers = index.search(TEXTS[0], k=12, rerank=0)
    fused = index.search(TEXTS[0], k=12, rerank=6)
    before = [hit.key for hit in towers.hits]
    assert (towers.reranked, fused.reranked, fused.total, fused.more) == (0, 6, COUNT, True)
    assert {hit.key for hit in fused.hits[:6]} == set(before[:6])
    assert [hit.key for hit in fused.hits[6:]] == before[6:]
    assert all(hit.rank_before == before.index(hit.key) + 1 for hit in fused.hits)
    assert all((hit.match is not None) == (hit.rank <= 6) for hit in fused.hits)
    assert [hit.rank for hit in fused.hits] == list(range(1, 13))
    logits = index.model.match([picture(int(hit.key[2:6])) for hit in fused.hits[:6]], [TEXTS[0]])[:, 0]
    for hit, chance in zip(fused.hits, logits.tolist()):
        assert hit.match == pytest.approx(chance, abs=0.05)  # from thumbnails
    pages = [index.search(TEXTS[0], k=4, rerank=6, offset=offset).hits for offset in (0, 4, 8)]
    assert [hit.key for page in pages for hit in page] == [hit.key for hit in fused.hits]


def test_many_queries_are_answered_as_single_ones(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [
        Query(TEXTS[0], k=5, rerank=4),
        Query(TEXTS[1], k=3, offset=4, rerank=0),
        Query(TEXTS[2], k=4, where="path starts 'b/'", rerank=4),
        Query(TEXTS[3], not_text=TEXTS[0], k=4, rerank=4, min_match=0.01),
        Query(image=picture(4), k=4),
        Query(TEXTS[4], image=picture(5), k=4, rerank=6),
        Query(TEXTS[0], k=5, rerank=0, min_match=0.5),
    ]
    alone = [Index(index.store, index.manifest, index.model).search_many([query])[0] for query in queries]
    passes, read = [], []
    search, texts = index.store.search, index.model.read_texts
    monkeypatch.setattr(index.store, "search", lambda *given: passes.append(len(given[0])) or search(*given))
    monkeypatch.setattr(index.model, "read_texts", lambda *given: read.append(len(given[0])) or texts(*given))
    together = Index(index.store, index.manifest, index.model).search_many(queries)
    assert sorted(passes) == [1, 6]  # one for each filter
    assert read == [5]
    for one, other in zip(alone, together, strict=True):
        assert [hit.key for hit in one.hits] == [hit.key for hit in other.hits]
        assert (one.total, one.more, one.reranked, one.notes) == (other.total, other.more, other.reranked, other.notes)
        for a, b in zip(one.hits, other.hits):
            assert (a.match, a.excluded, a.cosine) == pytest.approx((b.match, b.excluded, b.cosine), abs=1e-5)
    assert "min_match needs reranking" in together[-1].notes[0]
    assert index.search_many([]) == []


@pytest.mark.parametrize("rule", ["itm", "itm+itc", "itm_probability"])
def test_what_stands_higher_never_shows_a_smaller_match(
    index: Index, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.setattr(index.model, "score_rule", rule)
    fresh = Index(index.store, index.manifest, index.model)
    for text in TEXTS:
        for not_text in (None, "a green cat"):
            hits = fresh.search(text, not_text=not_text, k=20, rerank=20).hits
            shown = [hit.match for hit in hits]
            assert shown == sorted(shown, reverse=True)
            if not_text is not None:
                plain = {hit.key: hit.match for hit in fresh.search(text, k=COUNT, rerank=COUNT).hits}
                for hit in hits:
                    assert hit.match == pytest.approx(plain[hit.key] * (1 - hit.excluded), abs=1e-5)


def test_words_that_the_model_does_not_know_are_named(index: Index) -> None:
    found = index.search("ein 雪地 dog", not_text="a cat", rerank=3)
    assert [note for note in found.notes if "vocabulary" in note] == [
        "the model's vocabulary does not have 2 parts of the text: ein 雪地 dog"
    ]
    assert index.search(TEXTS[0], rerank=3).notes == ()


def test_words_are_found_in_a_picture_of_the_index(index: Index) -> None:
    explained, box = index.explain("a/0004.png", TEXTS[0])
    assert box == (0, 0, 1, 1)
    assert " ".join(explained.words) == TEXTS[0]
    side = index.model.config.vision.image.size // index.model.config.vision.patch
    assert explained.maps.shape == (len(explained.words), side, side)
    [match] = [hit.match for hit in index.search(TEXTS[0], k=COUNT, rerank=COUNT).hits if hit.key == "a/0004.png"]
    assert explained.score == pytest.approx(match, abs=1e-5)
    with pytest.raises(KeyError):
        index.explain("nobody", "a dog")


def test_pictures_are_projected_once_in_one_call(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    network = index.model.network
    match = network.match
    monkeypatch.setattr(network, "match", lambda *given: calls.append(len(given[2])) or match(*given))
    index.search("a word nobody said", not_text="grass", rerank=7)
    assert calls == [14]
    index.search("a word nobody said", not_text="grass", rerank=7, offset=7)
    assert calls == [14]  # the next page asks nothing again


def test_tokens_in_the_index_rerank_without_encoding(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals = imglish.search.open(made[2], device="cpu", feed_from="originals").search(TEXTS[1], rerank=8)
    for form, near in (("bfloat16", 0.02), ("int8", 0.04)):
        index = imglish.search.open(_index(made[0], tmp_path / form, made[1], form), device="cpu")
        monkeypatch.setattr(index.model.network, "encode_images", lambda images: pytest.fail("encoded again"))
        found = index.search(TEXTS[1], rerank=8)
        chances = {hit.key: hit.match for hit in originals.hits}
        assert found.reranked == 8
        assert all(hit.match == pytest.approx(chances[hit.key], abs=near) for hit in found.hits[:8])


def test_kept_tokens_are_read_as_they_were() -> None:
    rows = torch.randn(3, 5, 8)
    for form, near in (("bfloat16", 0.02), ("int8", 0.03)):
        back = unpack(pack(rows, form))
        assert isinstance(back, torch.Tensor)
        torch.testing.assert_close(back, rows, atol=near, rtol=near)
    ragged = Ragged(torch.randn(7, 8), Segments.of([3, 4]))
    back = unpack(pack(ragged, "bfloat16")[::-1])
    assert isinstance(back, Ragged)
    assert back.segments.lengths == (4, 3)
    for damage in (b"", b"x" * 40):
        with pytest.raises(ValueError, match="tokens"):
            unpack([damage])


def test_filters_negative_words_and_a_picture(index: Index) -> None:
    found = index.search(TEXTS[0], where="path starts 'b/'", k=COUNT, rerank=5)
    assert found.total == COUNT // 2
    assert {hit.key[0] for hit in found.hits} == {"b"}
    found = index.search(image=picture(7), k=3)
    assert found.hits[0].key == "b/0007.png"
    assert found.reranked == 0
    both = index.search(TEXTS[0], image=picture(7), k=3, rerank=4)
    assert both.reranked == 4
    excluded = index.search(TEXTS[0], not_text=TEXTS[1], k=5, rerank=5)
    assert all(hit.excluded is not None for hit in excluded.hits)
    near = index.similar("b/0007.png", k=4)
    assert "b/0007.png" not in [hit.key for hit in near.hits]
    assert len(near.hits) == 4


@pytest.mark.filterwarnings("ignore:Local mode performs exact")
def test_another_store_gives_the_same_answers(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    qdrant = pytest.importorskip("qdrant_client", reason="needs the extra qdrant")
    photos, folder, where = made
    model, config = load_model(folder), IndexConfig(progress=False, thumbnail=64)
    client = qdrant.QdrantClient(path=str(tmp_path))
    store = QdrantStore.open("qdrant+http://localhost:6333/photos", dimension_of(model), client)
    manifest = prepare(store, model, str(folder), config)
    summary = index_records(store, model, open_source(str(photos), needs="pictures"), str(photos), manifest, config)
    assert (summary.added, summary.rows) == (COUNT, COUNT)
    assert manifests.read(store) == manifest
    one, other = Index(store, manifest, model), imglish.search.open(where, model)
    queries = [Query(TEXTS[0], k=8, rerank=5), Query(image=picture(3), k=5, where="path starts 'b/' and width > 1")]
    for here, there in zip(one.search_many(queries), other.search_many(queries), strict=True):
        assert [hit.key for hit in here.hits] == [hit.key for hit in there.hits]
        assert [hit.captions for hit in here.hits] == [hit.captions for hit in there.hits]
        assert (here.total, here.more) == (there.total, there.more)
    again = index_records(store, model, open_source(str(photos), needs="pictures"), str(photos), manifest, config)
    assert (again.added, again.unchanged) == (0, COUNT)


def test_no_good_match_is_an_answer(index: Index) -> None:
    plain = index.search(TEXTS[0], rerank=6, k=COUNT)
    limit = sorted(hit.match for hit in plain.hits if hit.match is not None)[3]
    some = index.search(TEXTS[0], rerank=6, min_match=limit, k=COUNT)
    assert len(some.hits) == 3
    assert not some.no_good_match
    none = index.search(TEXTS[0], rerank=6, min_match=1.0)
    assert none.no_good_match
    assert none.hits == ()
    towers = index.search(TEXTS[0], rerank=0, min_match=0.9)
    assert "min_match needs reranking" in towers.notes[0]


def test_what_cannot_be_asked(index: Index) -> None:
    for wrong in ({}, {"text": " "}, {"text": "a", "k": 0}, {"text": "a", "offset": -1}, {"text": "a", "min_match": 2}):
        with pytest.raises(ValueError):
            index.search(**wrong)
    with pytest.raises(FilterError):
        index.search("a", where="colour = red")
    with pytest.raises(KeyError):
        index.thumbnail("../../etc/passwd")


def test_pictures_that_are_gone_stay_where_the_towers_put_them(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    photos = _photos(tmp_path / "photos")
    where = _index(photos, tmp_path / "index", made[1])
    index = imglish.search.open(where, device="cpu", feed_from="originals")
    first = index.search(TEXTS[0], k=5, rerank=0).hits[0].key
    (tmp_path / "photos" / first).unlink()
    found = index.search(TEXTS[0], k=5, rerank=5)
    assert found.reranked == 4
    assert "does not exist" in found.notes[0]
    assert next(hit for hit in found.hits if hit.key == first).match is None
    kept = imglish.search.open(where, device="cpu").search(TEXTS[0], k=5, rerank=5)
    assert kept.reranked == 5  # from its thumbnail


def test_other_models_and_models_without_fusion(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    other = export_model(tmp_path / "other", seed=3)
    with pytest.raises(ManifestError, match="other"):
        imglish.search.open(made[2], other, "cpu")
    clip = export_model(tmp_path / "clip", "clip")
    index = imglish.search.open(_index(made[0], tmp_path / "index", clip), device="cpu")
    found = index.search(TEXTS[0])
    assert (found.reranked, found.hits[0].match) == (0, None)


def test_calibration_makes_probabilities_frequencies() -> None:
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 3, 4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-(0.5 * margin - 2)))
    slope, offset = fit(margin, right)
    assert slope == pytest.approx(0.5, abs=0.05)
    assert offset == pytest.approx(-2, abs=0.15)
    plain = 1 / (1 + np.exp(-margin))
    logits = torch.stack([torch.zeros(len(margin)), torch.tensor(margin)], dim=1)
    fitted = margins(logits, Calibration(slope, offset, 1, 1, "", 0, 0)).sigmoid().numpy()
    assert calibration_error(fitted, right) < 0.03 < calibration_error(plain, right)
    slope, _ = fit(np.array([-1.0, 1.0]), np.array([False, True]))  # separable
    assert 0 < slope < 10


def test_a_calibration_is_kept_with_the_index(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    where = _index(made[0], tmp_path / "index", made[1])
    index = imglish.search.open(where, device="cpu")
    found = calibrate(index.model, open_source(str(made[0])), "held out", candidates=5, machine=MACHINE)
    assert found.queries == COUNT
    assert found.error_after <= found.error_before + 0.05
    manifests.write(index.store, replace(index.manifest, calibration=found))
    again = imglish.search.open(where, device="cpu").search(TEXTS[0], k=5, rerank=5)
    before = index.search(TEXTS[0], k=5, rerank=5)
    assert again.calibrated
    assert not before.calibrated
    assert [hit.key for hit in again.hits] == [hit.key for hit in before.hits]
    assert [hit.match for hit in again.hits] != [hit.match for hit in before.hits]


def test_the_command(
    made: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = str(made[2])
    assert main([where, TEXTS[0], "-k", "3", "--device", "cpu", "--html", str(tmp_path / "sheet.html")]) == 0
    out = capsys.readouterr().out
    assert "more: --offset 3" in out
    assert "data:image/" in (tmp_path / "sheet.html").read_text()
    assert main([where, TEXTS[0], "--json", "--device", "cpu", "--no-rerank"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["hits"]) == 20
    assert found["hits"][0]["match"] is None
    assert main([where, TEXTS[0], "--min-match", "1", "--device", "cpu"]) == NO_MATCH
    assert "no good match" in capsys.readouterr().out
    assert main([where, "--device", "cpu", "-k", "7", TEXTS[0], "--pictures", "iterm2"]) == 0  # words behind options
    strip = base64.b64decode(capsys.readouterr().out.rpartition("File=inline=1;size=")[2].split(":")[1].split("\a")[0])
    assert Image.open(io.BytesIO(strip)).size == (5 * 154, 2 * 154)
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.delenv("TMUX", raising=False)
    for terminal in (True, False):  # never into a pipe
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert main([where, TEXTS[0], "-k", "2", "--device", "cpu"]) == 0
        assert ("\x1b_G" in capsys.readouterr().out) == terminal
    assert main([where, TEXTS[0], "--where", "x = 1"]) == 2
    assert main([where]) == 2
    assert main([str(tmp_path / "nowhere"), "a"]) == 1
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, open(writing, "w") as pipe:
        patch.setattr(sys, "stdout", pipe)
        assert cli.main(["search", where, TEXTS[0], "--device", "cpu"]) == cli.UNREAD  # its reader has gone
    assert "pipe" not in capsys.readouterr().err
