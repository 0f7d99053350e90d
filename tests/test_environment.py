"""The environment maker: it parses on old Pythons, says what is wrong in one sentence, and survives
interruptions.

The environments here are real ones made in a temporary folder; their "requirements" are one tiny
wheel on disk, so nothing needs the network.
"""

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from core import environment
from core.environment import STAMP, ensure_environment, host_problem

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["requirements.txt", "requirements-test.txt"]


@pytest.mark.parametrize(
    "name",
    [
        "core/environment.py",
        "core/locks.py",
        "core/__init__.py",
        "scripts/run_tests.py",
        "scripts/quickstart.py",
    ],
)
def test_parses_on_any_python_3(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 4))
    modern = [ast.JoinedStr, ast.NamedExpr, ast.AnnAssign, ast.Match]
    assert not [node for node in ast.walk(tree) if type(node) in modern]
    imported = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imported}
    assert modules <= set(sys.stdlib_module_names) | {"core.environment", "core.locks"}


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (
            ((3, 9), "CPython", "linux-x86_64"),
            ["Python 3.9", "install a 64-bit Python 3.10 to 3.14"],
        ),
        (((2, 7), "CPython", "linux-x86_64"), ["Python 2.7", "install"]),
        (((3, 15), "CPython", "linux-x86_64"), ["Python 3.15", "install"]),
        (((3, 12), "PyPy", "linux-x86_64"), ["PyPy", "install"]),
        (((3, 12), "CPython", "win32-32bit"), ["win32-32bit", "install a 64-bit Python"]),
        (((3, 12), "CPython", "win-arm64"), ["win-arm64", "Windows (x86-64)"]),
        (((3, 12), "CPython", "macosx-x86_64"), ["macosx-x86_64", "Apple silicon", "arm64"]),
        (((3, 12), "CPython", "macosx-arm64-before-14"), ["macOS 14 or newer"]),
        (((3, 12), "CPython", "linux-x86_64-musl"), ["glibc"]),
        (((3, 12), "CPython", "freebsd-14.1-release-amd64"), ["freebsd", "use Linux"]),
    ],
)
def test_a_host_that_cannot_run_torch_gets_one_sentence_with_the_cure(host, words):
    sentence = host_problem(*host)
    assert all(word in sentence for word in words)
    assert "\n" not in sentence and ". " not in sentence


@pytest.mark.parametrize("name", environment.PLATFORMS)
@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_supported_hosts_pass(name, version):
    assert host_problem(version, "CPython", name) == ""


def test_ones_own_python_needs_no_build_of_torch():
    assert host_problem((3, 15), "CPython", "linux-riscv64", as_it_is=True) == ""
    assert "3.9" in host_problem((3, 9), "CPython", "linux-x86_64", as_it_is=True)


def test_this_host_is_named_as_supported():
    assert environment.host_platform() in environment.PLATFORMS


def run_script(source, folder, **variables):
    """Run ``source`` in a fresh Python that finds the project's code; return its exit code and both
    outputs.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return done.returncode, done.stdout, done.stderr


def test_a_python_without_ensurepip_is_told_the_package_to_install(tmp_path):
    write_requirements(tmp_path)
    # None in sys.modules makes the import fail, as it does where a distribution ships ensurepip
    # apart.
    code, _, error = run_script(
        """
        import sys
        sys.modules["ensurepip"] = None
        from core.environment import ensure_environment
        ensure_environment(["requirements.txt"], root=".")
        """,
        tmp_path,
    )
    assert code == 2
    assert error.count("\n") == 1 and "apt install python3." in error
    assert not (tmp_path / ".venv").exists()


def write_requirements(folder):
    """Two requirement files like the project's, whose only package is a wheel beside them."""
    with zipfile.ZipFile(folder / "pebble-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pebble.py", "SIZE = 1\n")
        wheel.writestr(
            "pebble-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: pebble\nVersion: 1.0\n"
        )
        wheel.writestr(
            "pebble-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("pebble-1.0.dist-info/RECORD", "")
    (folder / NAMES[0]).write_text(
        f"# tiny\n{folder / 'pebble-1.0-py3-none-any.whl'}\n", encoding="utf-8"
    )
    (folder / NAMES[1]).write_text(f"-r {NAMES[0]}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder whose environment was made from nothing, and its Python. Tests leave it finished."""
    folder = tmp_path_factory.mktemp("made")
    write_requirements(folder)
    return folder, ensure_environment(NAMES[:1], root=str(folder))


def imports_pebble(python):
    return subprocess.run([python, "-c", "import pebble"], capture_output=True).returncode == 0


def test_an_environment_is_made_from_nothing_and_then_left_alone(made, monkeypatch):
    folder, python = made
    assert imports_pebble(python)
    stamp = json.loads((folder / ".venv" / STAMP).read_text(encoding="utf-8"))
    assert (
        stamp["python"] == "{}.{}".format(*sys.version_info[:2])
        and list(stamp["files"]) == NAMES[:1]
    )

    monkeypatch.setattr(environment, "run", None)  # any further step would call it
    assert ensure_environment(NAMES[:1], root=str(folder)) == python


def test_more_requirements_are_added_without_forgetting_the_others(made):
    folder, _ = made
    ensure_environment(NAMES[1:], root=str(folder))
    assert sorted(
        json.loads((folder / ".venv" / STAMP).read_text(encoding="utf-8"))["files"]
    ) == sorted(NAMES)


@pytest.mark.parametrize(
    "state", ["no stamp", "half a stamp", "stamp of other requirements", "stamp of another Python"]
)
def test_an_unfinished_environment_is_finished_and_kept(made, state):
    folder, python = made
    stamp, kept = folder / ".venv" / STAMP, folder / ".venv" / "kept"
    kept.touch()
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "pebble"], check=True)
    if state == "no stamp":
        stamp.unlink()
    elif state == "half a stamp":
        stamp.write_text(stamp.read_text(encoding="utf-8")[:20], encoding="utf-8")
    elif state == "stamp of other requirements":
        with (folder / NAMES[0]).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
    else:
        stamp.write_text(
            stamp.read_text(encoding="utf-8").replace('"python": "3.', '"python": "2.'),
            encoding="utf-8",
        )
    ensure_environment(NAMES[:1], root=str(folder))
    assert imports_pebble(python) and stamp.exists() and kept.exists()


def test_a_failed_installation_leaves_no_stamp_and_names_the_way_on(made, capsys):
    folder, _ = made
    good = (folder / NAMES[0]).read_text(encoding="utf-8")
    (folder / NAMES[0]).write_text("./missing-1.0-py3-none-any.whl\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        ensure_environment(NAMES[:1], root=str(folder))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "requirements.txt" in error and "start again" in error
    assert not (folder / ".venv" / STAMP).exists()
    (folder / NAMES[0]).write_text(good, encoding="utf-8")
    ensure_environment(NAMES[:1], root=str(folder))


def test_an_environment_that_cannot_install_is_made_anew(tmp_path):
    write_requirements(tmp_path)
    # What a kill at the wrong moment leaves behind: half of pip, which can be imported but cannot
    # install.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (site_packages,) = (tmp_path / ".venv").glob("[Ll]ib/**/site-packages")
    (site_packages / "pip").mkdir()
    (site_packages / "pip" / "__init__.py").touch()
    (tmp_path / ".venv" / "left over").touch()
    python = ensure_environment(NAMES[:1], root=str(tmp_path))
    assert imports_pebble(python)
    assert not (tmp_path / ".venv" / "left over").exists()


LOCK = """
    import os, sys, time
    from core.environment import _only_one
    with _only_one("lock"):
        print("held", flush=True)
        {}
"""


def test_one_run_waits_for_another_and_a_killed_one_leaves_nothing_behind(tmp_path):
    environment_with_code = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOCK.format("time.sleep(60)"))],
        cwd=tmp_path, env=environment_with_code, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    waiter = subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(LOCK.format("pass"))],
        cwd=tmp_path, env=environment_with_code, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "waiting" in waiter.stdout.readline()
    holder.kill()
    assert waiter.communicate(timeout=20)[0] == "held\n" and waiter.returncode == 0
    holder.communicate()


def test_exit_codes_and_variables_pass_through(tmp_path):
    check = (
        "import os, sys; sys.exit(os.environ['PYTHONUTF8'] == '1' and os.environ['X'] == 'y' and 7)"
    )
    assert environment.run([sys.executable, "-c", check], {"X": "y"}) == 7


SAVES_ON_CTRL_C = """
    import sys, time
    from core.environment import run
    child = "try: print('up', flush=True); time.sleep(60)\\nexcept KeyboardInterrupt: time.sleep(1); print('saved')"
    code = run([sys.executable, "-c", "import time\\n" + child])
    print("then", code)
"""


@pytest.mark.skipif(os.name == "nt", reason="a group's signals are POSIX's")
def test_ctrl_c_waits_for_the_child_to_save_and_counts_as_130(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVES_ON_CTRL_C)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout.readline() == "up\n"
    time.sleep(0.2)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to everyone in the foreground
    output, error = parent.communicate(timeout=20)
    assert (output, error) == ("saved\nthen 130\n", "")


@pytest.mark.parametrize("script", ["run_tests.py", "quickstart.py"])
def test_help_needs_no_environment(script, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and script in done.stdout and done.stderr == ""
