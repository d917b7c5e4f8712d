"""The build: what setup.py says when something is missing, what it compiles; and every dependency is accounted for."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DEPENDENCIES = ROOT / "docs" / "DEPENDENCIES.md"


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of setup.py, run without building anything."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def compiled() -> list[str]:
    """COMPILED of setup.py, read from its syntax tree."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "COMPILED":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise AssertionError("setup.py has no list COMPILED")


def test_nothing_is_missing_here(setup_py: dict[str, Any]) -> None:
    assert setup_py["missing_tools"]() == []


def test_no_compiler(setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setenv("CC", "a-compiler")
    (message,) = setup_py["missing_tools"]()
    assert "'a-compiler'" in message
    assert "apt-get install gcc libc6-dev" in message


def test_no_headers(setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_, **__: {"include": str(tmp_path)})
    (message,) = setup_py["missing_tools"]()
    assert str(tmp_path / "Python.h") in message
    assert "apt-get install python3-dev" in message


def test_no_cython(setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Cython", None)
    (message,) = setup_py["missing_tools"]()
    assert "pip install 'Cython" in message


def test_a_build_without_tools_fails_with_one_line_that_names_them(tmp_path: Path) -> None:
    # A PATH with nothing in it, and a stand-in for Cython that cannot be imported.
    tmp_path.joinpath("Cython.py").write_text("raise ImportError\n")
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path), "CC": "no-such-compiler"}
    shutil.copy(ROOT / "setup.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("vmonty cannot be built; it needs a C compiler")
    assert "libc6-dev" in lines[-1]
    assert "Cython" in lines[-1]
    assert not any(line.startswith("Traceback") for line in lines)


@pytest.mark.parametrize("name", compiled())
def test_a_compiled_module_has_its_declarations(name: str) -> None:
    source = ROOT / "src" / Path(*name.split(".")).with_suffix(".py")
    assert source.exists()
    assert source.with_suffix(".pxd").exists()


def test_every_declaration_file_belongs_to_a_module() -> None:
    for declarations in ROOT.glob("src/vmonty/**/*.pxd"):
        named = declarations.stem == "__init__" or declarations.with_suffix(".py").exists()
        assert named or "extern" in declarations.read_text(), f"{declarations} declares a module that is not there"


def test_no_c_beside_the_sources() -> None:
    # The benchmark's payloads are guests' programs: compiled for a guest, when it is measured.
    payloads = ROOT / "src" / "vmonty" / "bench" / "payloads"
    found = [path for suffix in ("c", "cpp", "html") for path in ROOT.glob(f"src/**/*.{suffix}")]
    assert not [path for path in found if payloads not in path.parents or path.suffix != ".c"]


def test_the_packages_that_messages_name_are_those_that_the_set_up_installs() -> None:
    listed = {
        line.strip() for line in (ROOT / "debian-packages.txt").read_text().splitlines() if not line.startswith("#")
    }
    assert {"gcc", "libc6-dev", "python3-dev"} <= listed


# ---- dependencies --------------------------------------------------------------------------------------


def requirements() -> dict[str, set[str]]:
    """Name of each dependency → where pyproject.toml asks for it: build, run, or the name of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked: dict[str, set[str]] = {}
    lists = {
        "build": project["build-system"]["requires"],
        "run": project["project"]["dependencies"],
        **project["project"]["optional-dependencies"],
    }
    for where, items in lists.items():
        for item in items:
            asked.setdefault(re.match(r"[\w.-]+", item)[0].lower(), set()).add(where)  # type: ignore[index]
    return asked


def documented() -> dict[str, list[str]]:
    """Name → the cells of its row in the table of docs/DEPENDENCIES.md."""
    rows = [line for line in DEPENDENCIES.read_text().splitlines() if line.startswith("| [")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {re.match(r"\[([\w.-]+)\]", row[0])[1].lower(): row for row in cells}  # type: ignore[index]


def test_every_dependency_has_its_row_and_every_row_its_dependency() -> None:
    rows = documented()
    assert set(rows) == set(requirements())
    for name, where in requirements().items():
        package, when, why, licence, brings = rows[name]
        assert set(re.findall(r"\w+", when)) == where, package
        assert all((why, licence, brings)), package


def test_what_is_imported_at_run_time_is_a_dependency() -> None:
    # A package of a namespace is imported by it; compression is in the standard library from Python 3.14 on.
    # What only an extra brings is imported where it is used, with an error that says so.
    run = {
        name.partition(".")[0].replace("-", "_") for name, where in requirements().items() if where & {"run", "insight"}
    }
    # Three packages are imported by other names than their own.
    run |= {"vmonty", "compression"}
    run |= {
        called for name, called in (("pyyaml", "yaml"), ("pillow", "PIL"), ("pycryptodome", "Crypto")) if name in run
    }
    for path in ROOT.glob("src/vmonty/**/*.py"):
        # A compiled module's import of cython is the compiler's business.
        allowed = run | {"cython"} if path.with_suffix(".pxd").exists() else run
        for name in _imported_at_run_time(ast.parse(path.read_text())):
            assert name in allowed or name in sys.stdlib_module_names, f"{path} imports {name}"


def _imported_at_run_time(tree: ast.AST) -> set[str]:
    """Top-level names of all absolute imports, without those that only a type checker follows."""
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
        pending += ast.iter_child_nodes(node)
    return found


# ---- the two commands' scripts ---------------------------------------------------------------------------


def test_scripts_say_what_python_they_need(tmp_path: Path) -> None:
    done = _script("venv.sh", tmp_path, PYTHON="no-such-python")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no-such-python is not there; install Python 3.11 or newer")
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.9.2; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    done = _script("venv.sh", tmp_path, PYTHON=str(old))
    assert done.returncode == 1
    assert "Python 3.9.2 is too old" in done.stderr


def test_packages_are_only_named_where_they_cannot_be_installed(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sed", "sh"):
        programs.joinpath(name).symlink_to(str(shutil.which(name)))
    for name, body in {"id": "echo 1000", "sudo": "exit 1", "dpkg-query": "echo absent", "apt-get": "exit 9"}.items():
        programs.joinpath(name).write_text(f"#!{shutil.which('sh')}\n{body}\n")
        programs.joinpath(name).chmod(0o755)
    done = _script("packages.sh", tmp_path, PATH=str(programs))
    assert done.returncode == 0
    assert "sudo apt-get install --no-install-recommends gcc libc6-dev" in done.stderr
    programs.joinpath("apt-get").unlink()
    done = _script("packages.sh", tmp_path, PATH=str(programs))
    assert done.returncode == 0
    assert done.stderr.startswith("note: no apt-get here; tests that need these packages will be skipped: gcc")
    programs.joinpath("dpkg-query").write_text(f"#!{shutil.which('sh')}\necho installed\n")
    done = _script("packages.sh", tmp_path, PATH=str(programs))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _script(name: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(shutil.which("sh")), str(ROOT / "tools" / name), str(folder / "venv")],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
        env={**os.environ, "CI": "", **environment},
    )  # fmt: skip


def test_only_compiled_modules_go_without_mypy() -> None:
    """pyproject.toml's exemption lists exactly the compiled modules of the CPU, and nothing else."""
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    exempt = [name for entry in overrides if entry.get("ignore_errors") for name in entry["module"]]
    assert sorted(exempt) == sorted(name for name in compiled() if name.startswith("vmonty.cpu."))
