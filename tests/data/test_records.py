from __future__ import annotations

import pytest

from imglish.data.records import Record


def test_a_record_does_not_take_one_string_as_captions() -> None:
    with pytest.raises(TypeError, match="not one string"):
        Record("key", b"", "text", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 swapped captions for 1"):
        Record("key", b"", ("text",), 0, swapped=("a", "b"))
