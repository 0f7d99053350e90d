"""The environment maker says what is wrong in one sentence and survives interruptions.

The environment here is a real one in a temporary folder. Its only package is a tiny wheel on disk,
so nothing needs the network.
"""

import ast
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest

from core.environment import ROOT, STAMP, choose_python, ensure_environment, run
from core.errors import UserError
from core.files import try_lock

STARTERS = ["quickstart.py", "run_tests.py"]
NAMES = ["requirements.txt", "requirements-test.txt"]
WHEEL = {
    "pebble.py": "",
    "pebble-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: pebble\nVersion: 1.0\n",
    "pebble-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "pebble-1.0.dist-info/RECORD": "",
}


def child(program, *arguments, **settings):
    """A Python process that finds the project's code; its output can be read."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **settings)


@pytest.mark.parametrize("name", STARTERS)
def test_the_starters_need_no_environment_and_refuse_an_old_python(name, tmp_path):
    source = (ROOT / "scripts" / name).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 4))
    modern = (ast.JoinedStr, ast.NamedExpr, ast.AnnAssign, ast.Match)
    assert not [node for node in ast.walk(tree) if isinstance(node, modern)]
    start = "import runpy, sys; script, *sys.argv[1:] = sys.argv[1:];"
    for version, words in (((3, 9), []), (sys.version_info[:2], ["--help"])):
        program = f"{start} sys.version_info = {version}; runpy.run_path(script, None, '__main__')"
        process = child(program, ROOT / "scripts" / name, *words, cwd=tmp_path)
        output, error = process.communicate()
        assert (process.returncode, error.count("\n")) == ((0, 0) if words else (2, 1)), error
        assert name in output if words else "3.10 to 3.14" in error
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a finished environment, and its Python. Tests leave it finished."""
    folder = tmp_path_factory.mktemp("made")
    with zipfile.ZipFile(wheel := folder / "pebble-1.0-py3-none-any.whl", "w") as file:
        for name, text in WHEEL.items():
            file.writestr(name, text)
    (folder / NAMES[0]).write_text(f"{wheel}\n", encoding="utf-8")
    (folder / NAMES[1]).write_text(f"-r {NAMES[0]}\n", encoding="utf-8")
    # A kill at the wrong moment leaves half of pip, which can be imported but cannot install.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    (site_packages,) = (folder / ".venv").glob("[Ll]ib/**/site-packages")
    (site_packages / "pip").mkdir()
    (site_packages / "pip" / "__init__.py").write_text("", encoding="utf-8")
    return folder, ensure_environment(NAMES[:1], folder)


def has_pebble(python):
    return run([python, "-c", "import pebble"]) == 0


def test_an_environment_that_cannot_install_is_made_anew_and_then_left_alone(made):
    folder, python = made
    assert has_pebble(python)
    before = (folder / ".venv" / STAMP).stat().st_mtime_ns
    assert ensure_environment(NAMES[:1], folder) == python
    assert (folder / ".venv" / STAMP).stat().st_mtime_ns == before


def test_a_failed_installation_is_finished_by_the_next_run_and_forgets_nothing(made):
    folder, python = made
    good = (folder / NAMES[0]).read_text(encoding="utf-8")
    for path in (folder / ".venv").glob("**/pebble*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / NAMES[0]).write_text("./missing-1.0-py3-none-any.whl\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"requirements\.txt"):
        ensure_environment(NAMES[:1], folder)
    assert not (folder / ".venv" / STAMP).exists()
    (folder / NAMES[0]).write_text(good, encoding="utf-8")
    assert ensure_environment(NAMES[:1], folder) == python and has_pebble(python)
    stamp = folder / ".venv" / STAMP
    of_first = stamp.read_text(encoding="utf-8")
    ensure_environment(NAMES[1:], folder)
    assert all(name in stamp.read_text(encoding="utf-8") for name in NAMES)
    stamp.write_text(stamp.read_text(encoding="utf-8").replace('"3.', '"2.'), encoding="utf-8")
    ensure_environment(NAMES[:1], folder)
    assert stamp.read_text(encoding="utf-8") == of_first, "another Python's packages count for none"


def test_a_machine_without_a_build_of_torch_learns_what_is_supported(made, monkeypatch):
    folder, python = made
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (folder / "requirements-torch.txt").write_text("torch==0.0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"torch==0\.0.*3\.10 to 3\.14"):
        ensure_environment(["requirements-torch.txt"], folder)
    assert ensure_environment(NAMES[:1], folder) == python
    assert choose_python(NAMES, ["--use_this_python", "-x"]) == (sys.executable, ["-x"])


def test_a_run_waits_for_another_that_prepares_the_environment(made):
    folder, _ = made
    (folder / ".venv" / STAMP).unlink()
    program = "import sys; from pathlib import Path; from core import environment, errors;"
    program += "making = environment.ensure_environment, ['requirements.txt'], Path(sys.argv[1]);"
    program += "errors.run(lambda: making[0](*making[1:]))"
    with (folder / ".venv.lock").open("a") as lock:
        assert try_lock(lock)
        other = child(program, folder)
        assert "waiting" in other.stdout.readline()
        assert not (folder / ".venv" / STAMP).exists()
    other.communicate()
    assert other.returncode == 0 and (folder / ".venv" / STAMP).exists()


@pytest.mark.skipif(os.name == "nt", reason="a group's signals are POSIX's")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 7)])
def test_a_signal_reaches_the_child_which_may_still_save(number, code):
    saving = "import os, signal, sys, time\n"
    # The signal may come while print is at work, which cannot be interrupted by another print.
    saving += "saves = lambda *_: (time.sleep(0.3), os.write(1, b'saved' + b'\\n'), sys.exit(7))\n"
    saving += f"signal.signal({int(number)}, saves); print(os.environ['X'], flush=True)\n"
    saving += "time.sleep(60)"
    program = "import sys; from core.environment import run\n"
    program += f"print(run([sys.executable, '-c', {saving!r}], {{'X': 'up'}}))"
    parent = child(program, start_new_session=True)
    assert parent.stdout.readline() == "up\n"
    # A terminal sends Ctrl-C to everyone in the foreground.
    (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
    assert parent.communicate(timeout=20) == (f"saved\n{code}\n", "")


def test_a_command_whose_lines_nobody_can_hear_any_more_is_ended(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[0]
    )

    def hear(line):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(600)"], hear=hear)
    assert started[0].returncode not in (0, None)
