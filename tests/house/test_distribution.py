"""What `pip install millstream` gives: the built wheel is looked into, installed and imported."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import millstream

ROOT = Path(__file__).parents[2]
ROOMS = {"millstream": "millstream", "worker": "millstream_worker", "producer": "millstream_producer"}
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def _build(target: str, source: Path, into: Path) -> Path:
    _run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", into, cwd=source)
    [built] = into.iterdir()
    return built


def _files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in found}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, as an installer without our wheel would."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return _build("wheel", next(unpacked.iterdir()), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with nothing but ours in it."""
    into = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    _run(*pip, "--no-deps", "--no-index", "--target", into, wheel, cwd=into)
    return into


def test_the_version_is_one() -> None:
    """What is built and what `--version` says."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == millstream.__version__


def test_the_wheel_carries_every_file_of_the_three_rooms_and_nothing_else(wheel: Path) -> None:
    """A file left out (Lua, py.typed) is found by users first; a stray folder lands in their site-packages."""
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"{package}/{name}" for room, package in ROOMS.items() for name in _files(ROOT / room)}
    assert carried == expected
    assert "millstream/py.typed" in carried


def test_the_sdist_carries_no_tests_and_no_secrets(sdist: Path) -> None:
    """Only what a build of the wheel needs is published."""
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    files = {"hatch_build.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", ".gitignore"}
    assert tops == files | ROOMS.keys()


def test_the_wheel_names_its_commands_and_its_licence(wheel: Path) -> None:
    """`millstream` and `millstream-worker` are the interface; the licence text travels with the code."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split(".dist-info/")[-1]: name for name in archive.namelist() if ".dist-info/" in name}
        points = configparser.ConfigParser()
        points.read_string(archive.read(names["entry_points.txt"]).decode())
    assert dict(points["console_scripts"]) == COMMANDS
    assert "licenses/LICENSE" in names


@pytest.mark.parametrize("command", COMMANDS)
def test_an_installed_command_explains_itself(command: str, site: Path, tmp_path: Path) -> None:
    """Relative imports and the contract are found under the names that the wheel gives the rooms."""
    said = _run(site / "bin" / command, "--help", cwd=tmp_path, PYTHONPATH=str(site), PYTHONSAFEPATH="1")
    assert "usage" in said.lower()


@pytest.mark.parametrize("room", ROOMS.values())
def test_the_installed_packages_are_the_ones_imported(room: str, site: Path, tmp_path: Path) -> None:
    """Guards the tests above: with the checkout imported instead, they would prove nothing."""
    said = _run(
        *(sys.executable, "-P", "-c", f"import {room}; print({room}.__file__)"), cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert said.strip() == str(site / room / "__init__.py")


@pytest.mark.parametrize("room", ["worker", "producer"])
def test_an_editable_install_runs_the_checkout(room: str, tmp_path: Path) -> None:
    """What .venv has installed as `millstream_worker` is the folder being edited, never a copy of it."""
    said = _run(sys.executable, "-P", "-c", f"import millstream_{room} as it; print(*it.__path__)", cwd=tmp_path)
    assert said.strip() == str(ROOT / room)
