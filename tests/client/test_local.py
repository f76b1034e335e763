"""``secateur local``: exit codes, one-line errors, files, and what a person sees."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from client.central.methods import METHODS
from client.central.settings import Training, Tuning
from server.cli import main

SMALL = ["--task", "tests.client.central.test_central:small", "--set", "training.epochs=2",
         "--set", "training.batch-size=10", "--set", "training.learning-rate=0.1",
         "--set", "training.momentum=0"]  # fmt: skip


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main(["local", *arguments])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_it_forgets_and_writes_a_report_and_the_model(capsys, tmp_path):
    code, out, err = call(
        capsys, "fisher-mask", *SMALL, "--forget-class", "0", "--retrain", "--json",
        "--set", "rate=0.2", "--set", "tune.epochs=2", "--out", "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert report["forgotten"] == {"kind": "class", "class": 0, "rows": 20, "of": 60}
    assert report["settings"]["method"]["rate"] == 0.2
    assert report["settings"]["training"]["epochs"] == 2
    assert len(report["tuned"]) == 2
    assert report["after"] == report["tuned"][-1]
    assert report["retrained"]["forget_test"] is not None
    assert report["cost"]["tuning_epochs"] == 2
    assert report["cost"]["retraining_seconds"] > 0
    assert set(load_file(tmp_path / "out/model.safetensors")) >= {"0.weight", "1.running_mean"}
    page = (tmp_path / "out/report.md").read_text()
    assert "| unlearned |" in page
    assert "| retrained |" in page
    assert "![classes](plots/classes.svg)" in page
    assert files(tmp_path / "out") == [
        "model.safetensors", "plots/classes.svg", "plots/curves.svg", "report.json", "report.md",
    ]  # fmt: skip
    call(capsys, "retrain", *SMALL, "--forget-class", "0", "--out", "out")
    assert "plots/curves.svg" not in files(tmp_path / "out")  # it was not fine-tuned


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_shards_are_models_of_their_own_and_the_report_tells_what_they_cost(capsys, tmp_path):
    code, out, _ = call(
        capsys, "sisa", *SMALL, "--forget-rows", "4", "--set", "shards=2", "--set", "slices=2",
        "--set", "tune.epochs=1", "--json", "--out", "out",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0
    assert report["guarantee"] == "exact"
    assert report["models"] == ["model-1.safetensors", "model-2.safetensors"]
    assert [name for name in files(tmp_path / "out") if "model" in name] == report["models"]
    model = load_file(tmp_path / "out/model-1.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.values())
    cost = report["cost"]
    assert cost["checkpoint_bytes"] == 4 * size
    assert (cost["slices"], cost["shards_retrained"]) == (4, 1)
    assert cost["slices_retrained"] in (1, 2)
    assert cost["training_seconds"] > 0
    assert cost["seconds"] > 0
    assert report["tuned"] == []
    assert report["warnings"] == [
        "not_tuned: 2 models make one prediction, so that there is nothing to fine-tune"
    ]
    (tmp_path / "out/model-best.safetensors").write_bytes(b"somebody's")
    call(capsys, "retrain", *SMALL, "--forget-rows", "4", "--out", "out")
    assert [name for name in files(tmp_path / "out") if "model" in name] == [
        "model-best.safetensors", "model.safetensors",
    ]  # fmt: skip


def test_a_run_with_other_settings_has_its_own_folder(capsys, tmp_path):
    for arguments in (
        ["--forget-class", "0"], ["--forget-class", "1"], ["--forget-rows", "1"],
        ["--forget-rows", "2"], ["--forget-class", "0", "--set", "tune.epochs=1"],
    ):  # fmt: skip
        call(capsys, "finetune", *SMALL, *arguments)
        call(capsys, "finetune", *SMALL, *arguments)
    folders = [path.name for path in (tmp_path / "runs/local").iterdir() if path.is_dir()]
    assert len(folders) == 5
    assert sum(name.startswith("finetune-class0-seed0-") for name in folders) == 2


def test_a_task_without_classes_has_a_report_without_figures(capsys, tmp_path):
    regression = ["--task", "tests.client.central.test_central:regression"]
    slow = ["--set", "training.learning-rate=0.001"]
    for method in ("fisher-mask", "sisa", "retrain"):
        code, *_ = call(capsys, method, *regression, *slow, "--forget-rows", "2", "--out", "out")
        assert code == 0
        assert not (tmp_path / "out/plots").exists()
    code, _, err = call(capsys, "fisher-mask", *regression, *slow, "--forget-class", "1")
    assert code == 1
    assert err.count("\n") == 1
    assert "class" in err


def test_the_same_seed_gives_the_same_report_times_aside(capsys):
    reports = []
    for seed in ("1", "1", "2"):
        _, out, _ = call(
            capsys, "label-flip", *SMALL, "--forget-rows", "1,5,7-20", "--seed", seed, "--json"
        )
        report = json.loads(out)
        reports.append({k: v for k, v in report.items() if k not in ("cost", "seed")})
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]
    assert reports[0]["forgotten"]["rows"] == 16
    assert reports[0]["retrained"] is None


def test_a_person_gets_a_table_and_a_kept_model_is_used_again(capsys, tmp_path):
    code, out, _ = call(capsys, "finetune", *SMALL, "--forget-class", "1", "--set", "tune.epochs=0")
    assert code == 0
    assert "finetune on" in out
    assert "guarantee: none" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    (kept,) = (tmp_path / "runs/local").glob("trained-*.safetensors")
    changed = kept.stat().st_mtime_ns
    call(capsys, "random-mask", *SMALL, "--forget-class", "1")
    assert kept.stat().st_mtime_ns == changed
    code, *_ = call(
        capsys, "random-mask", *SMALL, "--forget-class", "1", "--start", str(kept), "--out", "x"
    )
    assert code == 0


BAD = {
    "no target": (["finetune"], 2, "give one of --forget-class and --forget-rows"),
    "two targets": (
        ["finetune", "--forget-class", "1", "--forget-rows", "1"], 2, "give one of"),
    "no method": (["nosuch", "--forget-class", "1"], 2, "no method 'nosuch'; choose one of fisher-mask"),
    "unknown key": (["finetune", "--forget-class", "1", "--set", "x=1"], 2, "unknown key 'x'"),
    "unknown table": (["finetune", "--forget-class", "1", "--set", "a.x=1"], 2, "names no table"),
    "range": (
        ["fisher-mask", "--forget-class", "1", "--set", "rate=2"], 2, "rate = 2: input should be"),
    "training": (
        ["finetune", "--forget-class", "1", "--set", "training.epochs=0"], 2, "training.epochs = 0"),
    "class": (["finetune", "--forget-class", "9"], 1, "numbered from 0 to 2, got 9"),
    "negative class": (["finetune", "--forget-class", "-1"], 1, "got -1"),
    "rows": (["finetune", "--forget-rows", "1-"], 2, "names no rows"),
    "seed of the training": (
        ["finetune", "--forget-class", "1", "--set", "training.seed=1"], 2, "give it with --seed"),
    "infinite": (
        ["label-flip", "--forget-class", "1", "--set", "learning-rate=inf"], 2, "finite number"),
    "diverging method": (
        ["rapid-retraining", "--forget-class", "1", "--set", "rate=1e38"], 1, "diverged"),
    "no folder of models": (
        ["finetune", "--forget-class", "1", "--work", "/dev/null/x"], 1, "another folder with --work"),
    "not certified at all": (["pcmu", "--forget-class", "1"], 1, "set local=full"),
    "row": (["finetune", "--forget-rows", "60"], 1, "there is no row 60"),
    "start": (["finetune", "--forget-class", "1", "--start", "nosuch"], 1, "cannot be read"),
    "log": (
        ["amnesiac", "--forget-class", "1", "--start", "MODEL"], 1, "needs the batch log"),
    "needs": (["tfidf", "--forget-rows", "1"], 1, "give --forget-class"),
    "convolutions": (
        ["grad-mask", "--forget-class", "1", "--model", "mlp"], 1, "network with convolutions"),
    "diverging": (
        ["finetune", "--forget-class", "1", "--set", "training.learning-rate=1e30"], 1, "diverged"),
    "certificate": (["pcmu", "--forget-class", "1", "--set", "rounds=1"], 1, "uncertified=true"),
    "device": (["finetune", "--forget-class", "1", "--device", "abacus"], 1, "device 'abacus'"),
    "seed": (["finetune", "--forget-class", "1", "--seed", "-1"], 2, "-1 is not in the range"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_is_one_line(kind, capsys, tmp_path):
    arguments, expected, message = BAD[kind]
    if "MODEL" in arguments:
        call(capsys, "finetune", *SMALL, "--forget-class", "1", "--out", "made")
        arguments = [
            str(tmp_path / "made/model.safetensors") if a == "MODEL" else a for a in arguments
        ]
    code, out, err = call(capsys, arguments[0], *SMALL, *arguments[1:], "--out", "out")
    assert code == expected
    assert err.startswith("secateur: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    code, out, err = call(capsys, "finetune", *SMALL, "--forget-class", "1", "--out", "file")
    assert code == 1
    assert "cannot write to file: Not a directory" in err
    assert out == ""


def test_a_wrong_name_lists_all(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "--forget-rows" in out
    code, _, err = call(capsys, "nosuch", "--forget-class", "1")
    assert code == 2
    assert all(name in err for name in METHODS)


def test_the_page_has_every_method_with_its_settings():
    page = (Path(__file__).parents[2] / "docs/local.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    same_as = {"label-flip": "ascent", "partial-amnesiac": "amnesiac"}
    for name, method in METHODS.items():
        told = rows[name] + rows.get(same_as.get(name, ""), "")
        assert (f"({method.tuned})" in rows[name]) == bool(method.tuned), name
        for key, field in method.settings.model_fields.items():
            value = str(field.default).lower() if isinstance(field.default, bool) else field.default
            shown = "epochs` (" if value is None else f"{field.alias or key}={value}`"
            assert f"`{shown}" in told, (name, key)
    for key, field in {**Training.model_fields, **Tuning.model_fields}.items():
        if key in ("local_epochs", "batch_size", "momentum", "schedule"):
            assert f"`{field.alias or key}={field.default}`" in page
