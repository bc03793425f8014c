from __future__ import annotations

import json

import pytest

from imglish.checkpoints.foreign import FORMATS
from imglish.checkpoints.known import public_checkpoints
from imglish.cli import main
from imglish.models import registry


def test_every_configuration_is_listed_with_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["configurations"]}
    assert sorted(listed) == registry.names()
    assert set(listed["blip-base"]["can"]) >= {"towers", "match", "caption"}
    assert "caption" not in listed["clip-vit-b-32"]["can"]
    assert round(listed["clip-vit-b-32"]["parameters"] / 1e6, 1) == 151.3


def test_a_family_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "vilt"]) == 0
    said = capsys.readouterr().out
    assert "vilt-small" in said
    assert "dandelin" in said
    assert "blip" not in said
    with pytest.raises(SystemExit):
        main(["models", "gpt"])
    assert "there is no family 'gpt'" in capsys.readouterr().err


def test_public_checkpoints_are_of_kinds_that_can_be_read() -> None:
    for checkpoint in public_checkpoints():
        assert checkpoint.kind in FORMATS
        assert checkpoint.family in registry.FAMILIES
