"""Recall of a search on real pictures, by the way that people use, beside that of ``imglish eval retrieval``.

    python -m benchmarks.search_recall MODEL DATA --images FOLDER --split val --rerank 16

Makes an index of the pictures in a temporary folder, searches it with every caption, and runs the evaluation on the
same records. From the originals both rank alike; kept tokens are rounded, thumbnails are pictures of another size.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import imglish
import imglish.search
from benchmarks.common import table
from imglish.data.sources import SourceConfig, open_source
from imglish.evaluation.encoding import Machine
from imglish.evaluation.retrieval import RetrievalConfig, evaluate_retrieval
from imglish.search import Query
from imglish.search.feeding import FEEDS
from imglish.search.indexing import IndexConfig, index_records, prepare
from imglish.search.store import open_store

KS = (1, 5, 10)
AT_ONCE = 64  # searches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--images", help="folder that the names of pictures are relative to")
    parser.add_argument("--split")
    parser.add_argument("--limit", type=int, help="only the first pictures")
    parser.add_argument("--rerank", type=int, default=16)
    parser.add_argument("--feed", choices=[feed for feed in FEEDS if feed != "auto"], default="originals")
    options = parser.parse_args()
    model = imglish.load(options.model)
    records = open_source(SourceConfig(path=options.data, images=options.images, split=options.split))[: options.limit]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(tokens="bfloat16" if options.feed == "tokens" else "", duplicates=False, progress=False)
        store = open_store(f"{folder}/index", model.config.embed_dim)
        manifest = prepare(store, model, options.model, config)
        index_records(store, model, records, options.data, manifest, config)
        index = imglish.search.open(Path(folder) / "index", model, feed_from=options.feed)
        asked = [(record.key, caption) for record in records for caption in record.captions]
        for rerank in (0, options.rerank):
            places = []
            for low in range(0, len(asked), AT_ONCE):
                some = asked[low : low + AT_ONCE]
                found = index.search_many([Query(text, k=max(KS), rerank=rerank) for _, text in some])
                for (key, _), results in zip(some, found):
                    keys = [hit.key for hit in results.hits]
                    places.append(keys.index(key) if key in keys else len(records))
            recalls = [100 * float(np.mean([place < k for place in places])) for k in KS]
            lines.append(["search", str(rerank), *(f"{recall:.2f}" for recall in recalls)])
    settings = RetrievalConfig(
        rerank=options.rerank, ks=KS, score_rule="itm_probability", machine=Machine(progress=False)
    )
    expected = evaluate_retrieval(model.network, model.tokenizer, records, settings)
    for rerank, recalled in ((0, expected.towers), (options.rerank, expected.reranked)):
        assert recalled is not None
        lines.append(["evaluation", str(rerank), *(f"{recalled[f't2i_r{k}']:.2f}" for k in KS)])
    print(f"{len(asked)} captions of {len(records)} pictures, reranked from {options.feed}\n")
    print(table(["by", "reranked", *(f"text→image R@{k}" for k in KS)], lines))


if __name__ == "__main__":
    main()
