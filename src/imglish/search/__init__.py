"""Searching pictures by words and pictures: recall by the towers, reranking by the fusion tower.

>>> index = imglish.search.open("photos.index")
>>> results = index.search("black top, white trousers", k=20, rerank=40)
>>> for hit in results.hits:
...     print(hit.rank, hit.match, hit.key)
"""

from __future__ import annotations

from imglish.search.engine import Index as Index
from imglish.search.engine import open as open
from imglish.search.filters import FilterError as FilterError
from imglish.search.manifest import ManifestError as ManifestError
from imglish.search.query import Query as Query
from imglish.search.results import Results as Results
from imglish.search.results import SearchHit as SearchHit
from imglish.search.store import StoreError as StoreError

__all__ = ["FilterError", "Index", "ManifestError", "Query", "Results", "SearchHit", "StoreError", "open"]
