"""On real Ray: the demo's whole story, and that the engine changes nothing."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.cli import main
from simulation.report import without_times

SMALL = ["rounds=8", "warm-up=3", "local-epochs=2", "batch-size=16", "model=mlp", "optimizer=adam",
         "learning-rate=0.003", "weight-decay=0.0", "momentum=0.0", "pruning-rate=0.1",
         "attack.share=0.8"]  # fmt: skip

pytestmark = pytest.mark.ray


def run(folder, *arguments):
    pairs = [part for pair in SMALL for part in ("--set", pair)]
    with pytest.raises(SystemExit) as done:
        main(["run", "demo", "--out", str(folder), *pairs, *arguments])
    assert done.value.code == 0
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["fedup", "fedrecover"])  # the second asks clients itself
def test_ray_and_one_process_give_the_same_report_and_model_bit_for_bit(
    method, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # only --ray-address auto reads it
    common = ("--seed", "3", "--set", f"method={method}")
    on_ray = run(tmp_path / "ray", "--engine", "ray", *common)
    alone = run(tmp_path / "alone", "--engine", "inprocess", "--no-batch", *common)
    assert without_times(on_ray) == without_times(alone)
    assert [u["method"] for u in on_ray["unlearnings"] if not u["refused"]] == [method]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ray", "alone"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("local", ["path", "full"])
def test_ffmu_gives_the_same_bits_on_ray_and_in_one_process(local, tmp_path):
    common = ["--set", "rounds=3", "--set", "examples=300", "--set", f"local-gradient={local}",
              "--set", "clients.total=4"]  # fmt: skip
    reports, models = [], []
    for engine in (["--engine", "ray"], ["--engine", "inprocess", "--no-batch"]):
        folder = tmp_path / engine[1]
        with pytest.raises(SystemExit) as done:
            main(["run", "ffmu", "--out", str(folder), *common, *engine])
        assert done.value.code == 0
        reports.append(json.loads((folder / "report.json").read_text(encoding="utf-8")))
        models.append(load_file(folder / "model.safetensors"))
    assert without_times(reports[0]) == without_times(reports[1])
    assert (reports[0]["ffmu"]["exact"]["share"] is None) == (local == "path")
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_an_error_in_the_server_is_one_line_and_not_a_hang(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["run", "demo", "--engine", "ray", "--out", str(tmp_path / "out"), "--set",
              "task=breast-cancer", "--set", "model="])  # fmt: skip
    assert done.value.code == 1
    assert "needs images of at least 3 x 3 pixels" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_the_process_and_leaves_nothing(tmp_path):
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "run", "demo", "--engine", "ray",
         "--out", str(tmp_path / "new/folder")],
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("round   2"):  # clients are at work
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "secateur: interrupted" in rest
    assert not (tmp_path / "new").exists()
