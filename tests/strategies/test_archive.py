"""Models on disk: what goes in comes out, in order, and nothing else does."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from strategies.archive import (
    DTYPES,
    Archive,
    SavedModel,
    client_of,
    file_bytes,
    file_name,
    save_model,
    saved_clients,
)
from unlearning.errors import ParametersError
from unlearning.history import clients, without_updates

MODEL = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1.0, -2.0]),
    "steps": torch.tensor(7),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def same(one, other):
    return list(one) == list(other) and all(
        torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in other
    )


def test_a_model_comes_back_bit_for_bit_in_its_own_order(tmp_path):
    save_model(tmp_path / "m.safetensors", MODEL, weight=12)
    found = SavedModel(tmp_path / "m.safetensors")
    assert same(found, MODEL)
    assert found.weight == 12
    assert len(found) == 4
    assert "c" not in found
    with pytest.raises(KeyError):
        found["c"]


def test_files_of_others_are_in_the_order_of_their_modules(tmp_path):
    names = ["net.10.weight", "net.2.weight", "net.2.bias", "head.weight"]
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "m.safetensors")
    found = SavedModel(tmp_path / "m.safetensors")
    assert list(found) == ["head.weight", "net.2.bias", "net.2.weight", "net.10.weight"]
    assert found.weight == 1
    told = {"order": json.dumps(names)}
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "m.safetensors", told)
    assert list(SavedModel(tmp_path / "m.safetensors")) == names


@pytest.mark.parametrize("told", ["no json", '["a"]', '"net"', "3"])
def test_an_order_that_is_none_is_not_followed(told, tmp_path):
    save_file(
        {"b": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "m.safetensors", {"order": told}
    )
    assert list(SavedModel(tmp_path / "m.safetensors")) == ["a", "b"]


def test_tensors_are_read_anew_and_views_and_shared_ones_can_be_written(tmp_path):
    stack = torch.arange(12.0).reshape(3, 4)
    tied = torch.ones(2)
    save_model(tmp_path / "m.safetensors", {"row": stack[1], "t": stack.T, "x": tied, "y": tied})
    found = SavedModel(tmp_path / "m.safetensors")
    assert torch.equal(found["row"], torch.tensor([4.0, 5.0, 6.0, 7.0]))
    assert torch.equal(found["t"], stack.T)
    assert torch.equal(found["y"], tied)
    found["row"].add_(1)
    assert torch.equal(found["row"], torch.tensor([4.0, 5.0, 6.0, 7.0]))


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "many"])
def test_weights_that_are_none(weight, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", {"num_examples": weight})
    with pytest.raises(ParametersError, match=rf"num_examples is '{weight}'; it must be a number"):
        _ = SavedModel(tmp_path / "m.safetensors").weight


def test_files_that_are_none(tmp_path):
    with pytest.raises(ParametersError, match=r"gone.safetensors cannot be read"):
        SavedModel(tmp_path / "gone.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ParametersError, match=r"bad.safetensors cannot be read"):
        SavedModel(tmp_path / "bad.safetensors")
    whole = tmp_path / "whole.safetensors"
    save_model(whole, MODEL)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-5])
    with pytest.raises(ParametersError, match=r"cut.safetensors cannot be read"):
        SavedModel(tmp_path / "cut.safetensors")
    with pytest.raises(ParametersError, match=r"cannot be written"):
        save_model(tmp_path / "no" / "m.safetensors", MODEL)


def test_a_file_that_becomes_shorter_is_told(tmp_path):
    save_model(tmp_path / "m.safetensors", MODEL)
    found = SavedModel(tmp_path / "m.safetensors")
    with (tmp_path / "m.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    with pytest.raises(ParametersError, match="became shorter while it was read"):
        dict(found)
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(ParametersError, match="cannot be read: No such file"):
        found["steps"]


def test_a_schema_tells_forms_and_reads_nothing(tmp_path):
    save_model(tmp_path / "m.safetensors", MODEL)
    schema = SavedModel(tmp_path / "m.safetensors").schema
    assert list(schema) == list(MODEL)
    assert all((schema[n].shape, schema[n].dtype) == (t.shape, t.dtype) for n, t in MODEL.items())
    assert all(tensor.is_meta for tensor in schema.values())


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_stretch_is_the_part_of_the_tensor_and_a_form_is_what_it_is_like(dtype, wide, tmp_path):
    model = {"a": torch.arange(3.0), "w": torch.arange(12.0).reshape(3, 4).to(dtype)}
    save_model(tmp_path / "m.safetensors", model)
    saved = SavedModel(tmp_path / "m.safetensors", wide=wide)
    scratch = torch.empty(100, dtype=torch.uint8)
    found = saved.stretch("w", 5, 9, scratch)
    assert torch.equal(found, saved["w"].reshape(-1)[5:9])
    assert found.dtype == saved["w"].dtype == saved.form("w").dtype == torch.float32
    assert saved.form("w").shape == (3, 4)
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(ParametersError, match="became shorter"):
        saved.stretch("w", 5, 9, scratch)


def test_names_are_known_without_reading(tmp_path):
    save_model(tmp_path / "m.safetensors", MODEL)
    found, other = (SavedModel(tmp_path / "m.safetensors") for _ in "12")
    (tmp_path / "m.safetensors").unlink()
    assert "steps" in found
    assert "c" not in found
    assert found.keys() == other.keys() == MODEL.keys()


def test_types_that_models_have_come_back(tmp_path):
    model = {str(dtype): torch.tensor([0, 1]).to(dtype) for dtype in DTYPES.values()}
    model["empty"] = torch.zeros(0, 3)
    save_model(tmp_path / "m.safetensors", model)
    assert same(SavedModel(tmp_path / "m.safetensors"), model)


def test_clients_are_sorted_by_name_and_each_has_one_file(tmp_path):
    for client in ("zoe", "élan", "global", "a/b"):
        save_model(tmp_path / file_name(client), MODEL)
    save_model(tmp_path / "global.safetensors", MODEL)
    assert list(saved_clients(tmp_path)) == ["a/b", "global", "zoe", "élan"]
    save_model(tmp_path / "%7Aoe.safetensors", MODEL)
    with pytest.raises(ParametersError, match="are both of client 'zoe'; keep one"):
        saved_clients(tmp_path)


@given(st.text(min_size=1, max_size=40).filter(lambda t: t.isprintable()), st.text(max_size=5))
def test_any_name_of_a_client_is_a_file_name_of_its_own(tmp_path_factory, name, other):
    path = tmp_path_factory.getbasetemp() / file_name(name)
    assert path.parent == tmp_path_factory.getbasetemp()
    assert client_of(path) == name
    assert (file_name(name) == file_name(other)) == (name == other)


@pytest.mark.parametrize("name", ["global", "..", ".", "a/b", "../up", ".hidden", "x.safetensors"])
def test_names_with_a_meaning_have_none_here(name, tmp_path):
    archive = Archive(tmp_path / "h")
    archive.record(1, MODEL, {name: MODEL, "other": MODEL}, {name: 2.0, "other": 1.0})
    assert archive.weights(1) == {name: 2.0, "other": 1.0}
    assert sorted(p.name for p in (tmp_path / "h").iterdir()) == ["round-0001"]
    archive.forget([name])
    assert list(saved_clients(tmp_path / "h" / "round-0001")) == ["other"]


def test_an_archive_is_a_history(tmp_path):
    archive = Archive(tmp_path / "history")
    assert archive.rounds == ()
    start = {"w": torch.tensor([1.0, 1.0])}
    models = {"a": {"w": torch.tensor([3.0, 1.0])}, "b": {"w": torch.tensor([1.0, 5.0])}}
    archive.record(1, start, models, {"a": 1, "b": 3})
    archive.record(12, start, {"a": models["a"]}, {"a": 5})
    assert archive.rounds == (1, 12)
    assert clients(archive) == {"a", "b"}
    assert same(archive.start(12), start)
    assert same(archive.models(1)["b"], models["b"])
    # a: 1/4 of (2, 0) in round 1, all of (2, 0) in round 12.
    left = without_updates({"w": torch.tensor([10.0, 10.0])}, archive, frozenset({"a"}))
    assert torch.equal(left["w"], torch.tensor([7.5, 10.0]))
    archive.record(12, start, {"b": models["b"]}, {"b": 1})
    assert list(archive.models(12)) == ["b"]
    archive.drop(1)
    assert archive.rounds == (12,)
    assert archive.bytes_held() == sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))


def test_a_round_is_recorded_whole_or_not_at_all(tmp_path):
    archive = Archive(tmp_path / "history")
    with pytest.raises(KeyError):
        archive.record(1, MODEL, {"a": MODEL, "b": MODEL}, {"a": 1.0})
    assert archive.rounds == ()
    assert list((tmp_path / "history").iterdir()) == []


def test_the_size_of_a_file_is_foreseen(tmp_path):
    large = {**MODEL, "c.weight": torch.zeros(5000), "d.weight": torch.zeros(3000).half()}
    save_model(tmp_path / "m.safetensors", large)
    size = (tmp_path / "m.safetensors").stat().st_size
    assert size <= file_bytes(large) <= size + 1024
