"""The command line: exit codes, one-line errors, and nothing half-written left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from server.cli import COMMANDS, main
from unlearning.catalogue import METHODS

QUICK = ["--engine", "inprocess", "--set", "rounds=4", "--set", "warm-up=1", "--set", "clients.total=6",
         "--set", "clients.malicious=2", "--set", "local-epochs=1", "--set", "examples=400"]  # fmt: skip


def call(capsys, *arguments):
    """Run the command in this process; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_command_has_help(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for name, (_, text) in COMMANDS.items():
        assert name in out
        assert text[:30] in out
        code, own, _ = call(capsys, name, "--help")
        assert code == 0
        assert name in own


def test_help_and_errors_load_no_experiments():
    code = (
        "import sys\nfrom server.cli import main\ntry:\n    main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'flwr', 'simulation'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr


SLOW = {
    "datasets",
    "flwr_datasets",
    "matplotlib",
    "pandas",
    "ray",
    "scipy",
    "sklearn",
    "torchvision",
}


@pytest.mark.parametrize(("hook", "number"), [("__enter__", 0), ("round", 1)])
def test_a_run_starts_without_packages_that_it_does_not_need_yet(hook, number, tmp_path):
    code = (
        "import sys\nfrom server.cli import main\nfrom simulation.progress import Progress\n"
        "def look(self, stage=None, record=None):\n"
        f"    if record is None or record.number == {number}:\n"
        f"        raise SystemExit('loaded: ' + str(sorted({SLOW} & set(sys.modules))))\n"
        f"Progress.{hook} = look\n"
        f"main({['run', 'clean', *QUICK, '--set', 'clients.malicious=0', '--out', str(tmp_path / 'out')]})"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=root, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "loaded: []", done.stderr


def test_where_experiments_are_not_installed_it_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "simulation", None)
    monkeypatch.delitem(sys.modules, "simulation.commands", raising=False)
    code, _, err = call(capsys, "demo")
    assert code == 1
    assert err == (
        "secateur: 'demo' runs experiments, and they are not installed here; install Secateur "
        "from its source tree\n"
    )


@pytest.mark.parametrize("command", ["scenarios", "attacks", "methods", "detectors"])
def test_lists_are_tables_and_json(command, capsys):
    code, out, _ = call(capsys, command, "--json")
    assert code == 0
    rows = json.loads(out)
    code, table, _ = call(capsys, command)
    assert code == 0
    assert rows
    assert all(row["name"].split("-")[0] in table for row in rows)


def test_methods_are_shown_with_all_that_a_choice_needs(capsys):
    _, out, _ = call(capsys, "methods")
    for entry in out.split("\n\n")[: len(METHODS)]:
        name = entry.split(":")[0].strip()
        told = " ".join(entry.split())
        known = METHODS[name]
        for fact in (
            *known.needs, *known.targets, f"guarantee {known.guarantee} ",
            f"lies {'yes' if known.safe else 'no'} ", known.rounds, known.stored, known.source,
        ):  # fmt: skip
            assert fact in told


BAD = {
    "unknown scenario": (["run", "nosuch"], 2, "there is no scenario 'nosuch'; choose one of"),
    "missing file": (["run", "nosuch.toml"], 2, "there is no scenario file nosuch.toml"),
    "unknown key": (["run", "demo", "--set", "lerning-rate=1"], 2, "unknown key 'settings.lerning-rate'"),
    "unknown table": (["run", "demo", "--set", "atack.share=1"], 2, "atack.share names no table"),
    "no value": (["run", "demo", "--set", "rounds"], 2, "--set takes KEY=VALUE, got 'rounds'"),
    "seed": (["run", "demo", "--seed", "x"], 2, "'x' is not a valid int"),
    "negative seed": (["run", "demo", "--seed", "-1"], 2, "-1 is not in the range"),
    "zero clients": (["run", "demo", "--set", "clients.total=0"], 2, "clients.total = 0"),
    "too many attackers": (["run", "demo", "--set", "clients.malicious=5"], 2, "strict minority: at most 4"),
    "rate": (["run", "demo", "--set", "pruning-rate=1.5"], 2, "pruning-rate = 1.5 is outside [0, 1]"),
    "method setting": (["run", "demo", "--set", "method-settings=ascent.epochs=0"], 2, "method-settings: ascent.epochs = 0: input should be greater than or equal to 1; the default is"),
    "share": (["run", "demo", "--set", "attack.share=2"], 2, "attack.share = 2"),
    "no such task": (["run", "demo", "--set", "task=nosuch"], 1, "there is no task 'nosuch'"),
    "no such module": (["run", "demo", "--set", "task=nosuch.module:task"], 1, "cannot be loaded"),
    "model": (["run", "demo", "--set", "model=vgg"], 1, "there is no model 'vgg'; known are"),
    "no data": (["run", "fashion-backdoor", "--data-dir", "empty"], 1, "give its folder with --data-dir"),
    "device": (["run", "demo", "--device", "tpu"], 2, "'tpu' is not one of"),
    "no cuda": (["run", "demo", "--set", "device=cuda:99"], 1, "device 'cuda:99' is not available here"),
    "engine": (["run", "demo", "--engine", "abacus"], 2, "'abacus' is not one of"),
    "trigger on a table": (["run", "demo", "--engine", "inprocess", "--set", "task=breast-cancer", "--set", "model="], 1, "needs images of at least 3 x 3"),
    "target": (["run", "demo", "--engine", "inprocess", "--set", "attack.target=12"], 1, "class 12 is to be attacked, and the task's classes are 0 to 9"),
    "threshold": (["run", "demo", "--engine", "inprocess", "--set", "detector-threshold=3"], 2, "detector-threshold = 3: the cohesion threshold must be"),
    "no factory": (["run", "demo", "--set", "task=math:sqrt"], 1, "task 'math:sqrt' cannot be made: TypeError"),
    "relative module": (["run", "demo", "--set", "task=.foo:bar"], 1, "task '.foo:bar' cannot be loaded"),
    "dropped attack": (["run", "clean", "--set", "attack.foo=1"], 2, "unknown key 'attack.foo'"),
    "table": (["run", "demo", "--set", "settings=3"], 2, "unknown key 'settings.settings'"),
    "partition": (["run", "demo", "--engine", "inprocess", "--set", "partition=dirichlet", "--set", "alpha=0.05", "--set", "clients.total=60"], 1, "leaves some of 60 clients fewer than 10"),
    "hits": (["run", "demo", "--set", "hits=5"], 2, "scenario demo: hits = 5 can never be reached within window = 4"),
    "cluster for another engine": (["run", "demo", "--engine", "inprocess", "--ray-address", "a:1"], 2, "--ray-address a:1 is for --engine ray, and the engine is inprocess; leave"),
    "cluster address": (["run", "demo", "--engine", "ray", "--ray-address", "http://a:1"], 2, "--ray-address 'http://a:1' is no address; give HOST:PORT, ray://HOST:PORT or auto"),
    "no cluster": (["run", "demo", "--engine", "ray", "--ray-address", "127.0.0.1:1"], 1, ":1 (failed to connect to all addresses"),
    "unknown command": (["prune"], 2, "No such command 'prune'"),
    "folder": (["run", "demo", "--out", "file/inside"], 1, "cannot write to file/inside"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(kind, capsys, tmp_path):
    arguments, expected, message = BAD[kind]
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    code, out, err = call(capsys, *arguments)
    last = err.splitlines()[-1]
    assert code == expected
    assert last.startswith("secateur: ")
    assert message in last
    assert "Traceback" not in err
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_all_faults_of_a_scenario_are_told_at_once(capsys, tmp_path):
    (tmp_path / "mine.toml").write_text(
        'summary = "mine"\ncolour = 1\n[clients]\ntotal = "many"\n[settings]\nrounds = 0\n',
        encoding="utf-8",
    )
    code, _, err = call(capsys, "run", "mine.toml")
    assert code == 2
    for fault in ("unknown key 'colour'", "clients.total = 'many'", "settings.rounds = 0"):
        assert fault in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'summary = "x"\nsettings = 3\n[clients]\ntotal = 4\n', "settings must be a table, got 3"),
        (b"summary = '\xff'", "cannot be read as UTF-8 text"),
        (b'summary = "x"\nextends = "mine.toml"\n', "extend one another in a circle"),
    ],
)
def test_scenario_files_that_cannot_be_used(text, message, capsys, tmp_path):
    (tmp_path / "mine.toml").write_bytes(text)
    code, _, err = call(capsys, "run", "mine.toml")
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_folder_in_the_way_of_the_report_is_told_before_anything_runs(capsys, tmp_path):
    (tmp_path / "out/report.json").mkdir(parents=True)
    code, _, err = call(capsys, "run", "demo", *QUICK, "--out", "out")
    assert code == 1
    assert "cannot write to out" in err
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out/report.json"]


def test_a_disk_that_fills_up_leaves_nothing(capsys, tmp_path, monkeypatch):
    real, written = Path.write_bytes, []

    def fill_up(self, content):
        written.append(self.name)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    code, _, err = call(capsys, "run", "demo", *QUICK, "--out", "new/folder")
    assert code == 1
    assert "No space left on device; free the place or choose another folder" in err
    assert not (tmp_path / "new").exists()


def test_a_task_that_lacks_a_part_is_told_which(capsys, tmp_path, monkeypatch):
    (tmp_path / "halfatask.py").write_text(
        "class Task:\n    def build_model(self): ...\n    def loss(self, outputs, targets): ...\n\n"
        "def make(options):\n    return Task()\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = call(capsys, "run", "demo", "--set", "task=halfatask:make")
    assert code == 1
    assert "task 'halfatask:make' lacks client_data, server_data, metrics" in err


def test_a_run_writes_every_file_and_prints_its_report(capsys, tmp_path):
    code, out, err = call(capsys, "run", "demo", *QUICK, "--out", "here", "--json", "--seed", "5")
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((tmp_path / "here/report.json").read_text(encoding="utf-8"))
    assert report["seed"] == 5
    assert "<html" in (tmp_path / "here/report.html").read_text(encoding="utf-8")
    model = safetensors.torch.load_file(tmp_path / "here/model.safetensors")
    assert model
    assert list((tmp_path / "here/plots").glob("*.svg"))
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_without_json_ends_with_a_summary(capsys, tmp_path):
    code, out, err = call(capsys, "run", "demo", *QUICK)
    assert code == 0, err
    assert "report: " in out
    assert "test accuracy" in out
    (report,) = (tmp_path / "runs").glob("demo-seed0-*/report.json")
    assert "changed here: rounds = 4" in report.read_text(encoding="utf-8")


def test_only_a_run_as_written_uses_the_plain_folder():
    from simulation.commands import default_folder
    from simulation.scenario import load_scenario

    demo = load_scenario("demo", {"seed": 3})
    assert default_folder(demo, {"seed": 3, "data-dir": "x"}) == Path("runs/demo-seed3")
    changed = default_folder(demo, {"seed": 3, "rounds": 9})
    assert changed.name.startswith("demo-seed3-")
    assert changed == default_folder(demo, {"rounds": 9, "seed": 3})
    assert changed != default_folder(demo, {"rounds": 8, "seed": 3})


def test_an_interrupted_run_leaves_no_folder(capsys, tmp_path, monkeypatch):
    from simulation.engines import inprocess

    def interrupt(self, messages, *, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(inprocess.InProcessGrid, "send_and_receive", interrupt)
    code, _, err = call(capsys, "run", "demo", *QUICK, "--out", "new/folder")
    assert code == 130
    assert "interrupted" in err
    assert not (tmp_path / "new").exists()


def test_run_trains_in_batches_in_this_process_and_the_demo_stays_on_ray(
    tmp_path, monkeypatch, capsys
):
    from simulation import commands

    asked = []
    monkeypatch.setattr(commands, "execute", lambda name, **given: asked.append((name, given)))
    for arguments in (["run", "clean"], ["run", "clean", "--no-batch"], ["demo"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
    assert [(name, given["engine"], given.get("batch", True)) for name, given in asked] == [
        ("clean", "inprocess", True), ("clean", "inprocess", False), ("demo", "ray", True),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(["run", "clean", "--engine", "ray", "--no-batch"])
    assert done.value.code == 2
    assert "--no-batch is for --engine inprocess" in capsys.readouterr().err
