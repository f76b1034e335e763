"""The shape of the repository: inert packages, names Flower accepts, and what the bundle holds."""

import ast
import importlib
import io
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("client", "server", "simulation", "strategies", "unlearning")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def modules():
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


@pytest.mark.parametrize("package", PACKAGES)
def test_our_packages_are_the_ones_imported(package):
    assert Path(importlib.import_module(package).__file__).parent == ROOT / package


@pytest.mark.parametrize("package", PACKAGES)
def test_package_inits_hold_a_docstring_and_nothing_else(package):
    for path in (ROOT / package).rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0].value.value, str), path


def test_every_folder_of_code_is_a_package_and_tests_are_none():
    folders = {path.parent for path in modules()}
    assert all((folder / "__init__.py").exists() for folder in folders)
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_module_has_a_name_that_the_bundle_leaves_out():
    names = [path.name for path in modules()]
    assert not [n for n in names if n.startswith("test_") or n.endswith("_test.py")]


def test_nothing_is_found_relative_to_a_file():
    assert not [path for path in modules() if "__file__" in path.read_text(encoding="utf-8")]


def test_no_unsafe_loading():
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        imported = {
            alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not called & {"eval", "exec"}, path
        assert not imported & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path


def test_imports_point_down():
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(linter)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The Flower app bundle, as Flower itself builds it, unpacked."""
    from flwr.cli.build import build_fab_from_disk

    folder = tmp_path_factory.mktemp("bundle")
    content = build_fab_from_disk(ROOT)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    return folder


def test_the_bundle_holds_exactly_what_server_and_clients_need(bundle):
    found = {
        str(path.relative_to(bundle))
        for path in bundle.rglob("*")
        if path.is_file() and path.suffix == ".py"
    }
    server = {"__init__", "app", "federation", "settings"}
    expected = {
        str(path.relative_to(ROOT))
        for package in ("client", "strategies", "unlearning")
        for path in (ROOT / package).rglob("*.py")
    } | {f"server/{name}.py" for name in server}
    assert found == expected


def test_the_bundle_holds_no_attack(bundle):
    text = "".join(path.read_text(encoding="utf-8") for path in bundle.rglob("*.py"))
    assert not (bundle / "simulation").exists()
    assert "def stamp" not in text
    assert "def label_flip" not in text


@pytest.mark.parametrize("component", ["serverapp", "clientapp"])
def test_components_load_from_the_bundle_in_a_fresh_process(bundle, component, tmp_path):
    reference = PYPROJECT["tool"]["flwr"]["app"]["components"][component]
    module, attribute = reference.split(":")
    code = (
        f"import sys; sys.path.insert(0, {str(bundle)!r}); import {module} as m; "
        f"print(m.__file__, type(m.{attribute}).__name__); "
        "assert 'simulation' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.startswith(str(bundle))


def test_run_config_lists_every_setting_with_its_default():
    from server.settings import Settings

    listed = PYPROJECT["tool"]["flwr"]["app"]["config"]
    assert listed == Settings().model_dump(by_alias=True)
