from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imglish.checkpoints.rules import TRANSPOSE, ConversionError, Cut, Drop, Fresh, Rule, Table, Tie, Transform

TABLE = Table(
    Rule("proj", "head.weight", TRANSPOSE),
    Rule("cls_token", "class_token", Transform(lambda x: x[0, 0], lambda x: x[None, None])),
    Rule(("layer.{i}.q.{leaf}", "layer.{i}.k.{leaf}", "layer.{i}.v.{leaf}"), "blocks.{i}.qkv.{leaf}"),
    Rule("layer.{i}.{j}.{name}.weight", "blocks.{i}.{name}.{j}"),
    Rule("words.weight", "words.weight"),
    Rule("temp", "temperature"),
    Tie("decoder.weight", "words.weight"),
    Drop("position_ids", "counts up"),
    Fresh("itm.{leaf}", "trained without"),
)


def official() -> dict[str, Tensor]:
    state = {
        "proj": torch.randn(3, 2),
        "cls_token": torch.randn(1, 1, 4),
        "words.weight": torch.randn(5, 4, dtype=torch.float16),
        "temp": torch.tensor(0.07),
        "position_ids": torch.arange(4),
        "layer.10.7.norm.weight": torch.randn(4),
    }
    state |= {f"layer.{i}.{n}.{leaf}": torch.randn(2) for i in range(2) for n in "vkq" for leaf in ("weight", "bias")}
    return state | {"decoder.weight": state["words.weight"].clone()}


def target() -> dict[str, Tensor]:
    shapes = {"head.weight": (2, 3), "class_token": (4,), "words.weight": (5, 4), "itm.bias": (2,), "temperature": ()}
    shapes |= {f"blocks.{i}.qkv.{leaf}": (6,) for i in range(2) for leaf in ("weight", "bias")}
    shapes |= {"blocks.10.norm.7": (4,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_every_name_lands_in_its_place() -> None:
    source = official()
    converted = TABLE.convert(source, target())
    state = converted.state
    assert list(state) == list(target())
    assert torch.equal(state["head.weight"], source["proj"].T)
    assert torch.equal(state["class_token"], source["cls_token"].reshape(4))
    assert torch.equal(state["blocks.10.norm.7"], source["layer.10.7.norm.weight"])
    joined = [source[f"layer.1.{n}.bias"] for n in "qkv"]
    assert torch.equal(state["blocks.1.qkv.bias"], torch.cat(joined))
    assert state["words.weight"].dtype == torch.float32
    assert converted.report == {
        "position_ids": "dropped: counts up",
        "decoder.weight": "tied to words.weight",
        "itm.bias": "fresh: trained without",
    }


def test_the_way_back() -> None:
    source = official()
    back = TABLE.revert(TABLE.convert(source, target()).state)
    assert set(back) == set(source) - {"position_ids"}
    for name, value in back.items():
        assert torch.equal(value, source[name].float()), name
    with pytest.raises(ConversionError, match="1 names of the model that no rule knows: other"):
        TABLE.revert({"other": torch.zeros(1)})


def test_unknown_and_missing_names_are_listed_together() -> None:
    source = official() | {"queue": torch.zeros(1), "layer.x.q.weight": torch.zeros(2)}
    del source["proj"]
    with pytest.raises(ConversionError) as caught:
        TABLE.convert(source, target())
    message = str(caught.value)
    assert "2 names in the checkpoint that no rule knows: queue, layer.x.q.weight" in message
    assert "1 names of the model that the checkpoint does not give: head.weight" in message


def test_shapes_are_compared() -> None:
    with pytest.raises(ConversionError, match=r"head.weight: \(3, 3\), expected \(2, 3\)"):
        TABLE.convert(official() | {"proj": torch.zeros(3, 3)}, target())


def test_a_name_made_that_the_model_does_not_have() -> None:
    wanted = target()
    del wanted["blocks.1.qkv.bias"]
    with pytest.raises(ConversionError, match=r"blocks.1.qkv.bias \(not a name of ours\)"):
        TABLE.convert(official(), wanted)


def test_parts_and_ties_must_be_complete() -> None:
    source = official()
    del source["layer.1.k.bias"]
    with pytest.raises(ConversionError, match=r"blocks.1.qkv.bias needs .*: only 2 of them are there"):
        TABLE.convert(source, target())
    with pytest.raises(ConversionError, match=r"decoder.weight should hold the same values as words.weight"):
        TABLE.convert(official() | {"decoder.weight": torch.zeros(5, 4)}, target())


def test_two_names_cannot_become_one() -> None:
    table = Table(Rule("a", "x"), Rule("b", "x"))
    with pytest.raises(ConversionError, match="b becomes x, which another name has become already"):
        table.convert({"a": torch.zeros(1), "b": torch.zeros(1)}, {"x": torch.zeros(1)})


def test_long_lists_are_cut() -> None:
    with pytest.raises(ConversionError, match=r"20 names .*a7 ... and 12 more"):
        Table().convert({f"a{i}": torch.zeros(1) for i in range(20)}, {})


def test_one_name_cut_into_several_and_joined_again() -> None:
    table = Table(Cut("pool.{i}.in", ("pool.{i}.q", "pool.{i}.kv"), (1, 2)), Cut("in", ("q", "kv"), (1, 2)))
    source = {"pool.3.in": torch.arange(6.0), "in": torch.arange(3.0)}
    shapes = {"pool.3.q": (2,), "pool.3.kv": (4,), "q": (1,), "kv": (2,)}
    state = table.convert(source, {name: torch.zeros(shape) for name, shape in shapes.items()}).state
    assert state["pool.3.q"].tolist() == [0, 1]
    assert state["pool.3.kv"].tolist() == [2, 3, 4, 5]
    back = table.revert(state)
    assert all(torch.equal(back[name], value) for name, value in source.items())
    with pytest.raises(ConversionError, match=r"pool.3.q without pool.3.kv: both come from pool.\{i\}.in"):
        table.revert({"pool.3.q": torch.zeros(2)})
    with pytest.raises(ConversionError, match="5 rows cannot be divided"):
        table.convert({"in": torch.zeros(5)}, {"q": torch.zeros(1), "kv": torch.zeros(2)})
    with pytest.raises(ConversionError, match="which another name has become already"):
        Table(Rule("a", "q"), Cut("in", ("q", "kv"), (1, 2))).convert(
            {"a": torch.zeros(1), "in": torch.zeros(3)}, {"q": torch.zeros(1), "kv": torch.zeros(2)}
        )


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
def test_numbers_of_another_kind_are_refused(kind: torch.dtype) -> None:
    with pytest.raises(ConversionError, match=rf"1 kinds of numbers that differ .*b: {kind}, expected torch\.float32"):
        Table(Rule("a", "b")).convert({"a": torch.ones(2, dtype=kind)}, {"b": torch.ones(2)})
    half = Table(Rule("a", "b")).convert({"a": torch.ones(2).half()}, {"b": torch.ones(2)})
    assert half.state["b"].dtype == torch.float32
