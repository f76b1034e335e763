"""On real Ray: clients drop a class in processes of their own, as they do in one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from server.cli import main
from simulation.report import without_times

SMALL = ["clients.total=3", "rounds=2", "examples=150", "local-epochs=1", "recovery-cap=1",
         "baselines.natural=false"]  # fmt: skip

pytestmark = pytest.mark.ray


def run(folder, *arguments):
    scenario = folder.parent / "mine.toml"
    scenario.write_text(
        'summary = "mine"\nextends = "forget-class"\n[[requests]]\nround = 1\ntarget = "class"\n'
        'label = 3\nguarantee = "approximate"\n',
        encoding="utf-8",
    )
    pairs = [part for pair in SMALL for part in ("--set", pair)]
    with pytest.raises(SystemExit) as done:
        main(["run", str(scenario), "--out", str(folder), *pairs, *arguments])
    assert done.value.code == 0
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_a_class_is_forgotten_on_ray_as_in_one_process_bit_for_bit(tmp_path):
    on_ray = run(tmp_path / "ray", "--engine", "ray")
    alone = run(tmp_path / "alone", "--engine", "inprocess", "--no-batch")
    assert without_times(on_ray) == without_times(alone)
    (unlearning,) = on_ray["unlearnings"]
    assert (unlearning["targets"], unlearning["refused"]) == (["class 3"], None)
    assert on_ray["settings"]["client-dir"] == ""
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ray", "alone"))
    assert all(torch.equal(one[key], other[key]) for key in one)
