"""The project's own Python environment, .venv: made, finished after an interruption, and used to
run commands.

Standard library only, and every line parses on any Python 3 (no f-strings, no annotations, nothing
newer than 3.4), so that an old Python gets as far as saying what is wrong. What the user can cure
ends the process with one sentence on stderr and exit code 2.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

from core.locks import try_lock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAMP = "requirements-stamp.json"
# What the pinned torch has builds for.
OLDEST, NEWEST = (3, 10), (3, 14)
PLATFORMS = ("linux-x86_64", "linux-aarch64", "macosx-arm64", "win-amd64")


def stop(sentence):
    """End the process: one line on stderr, exit code 2."""
    sys.stderr.write("error: " + sentence + "\n")
    raise SystemExit(2)


def run_main(main):
    """End the process with ``main``'s exit code; Ctrl-C gives 130 and no traceback."""
    try:
        code = main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    sys.exit(code)


def choose_python(requirement_files, arguments):
    """Return ``(python, the other arguments)``.

    ``python`` is the made environment's, or with ``--use_this_python`` the running one, with its
    packages as they are.
    """
    others = [argument for argument in arguments if argument != "--use_this_python"]
    as_it_is = len(others) < len(arguments)
    problem = host_problem(
        sys.version_info[:2], platform.python_implementation(), host_platform(), as_it_is
    )
    if problem:
        stop(problem)
    return (sys.executable if as_it_is else ensure_environment(requirement_files)), others


def host_problem(version, implementation, name, as_it_is=False):
    """Why the code, or (unless ``as_it_is``) the pinned torch, cannot run here and what to do; ""
    when it can.
    """
    wanted = "install a 64-bit Python %d.%d to %d.%d from python.org and start again with it" % (
        OLDEST + NEWEST
    )
    if version < OLDEST or (version > NEWEST and not as_it_is):
        return "Python %d.%d is not supported: %s" % (version + (wanted,))
    if as_it_is or (name in PLATFORMS and implementation == "CPython"):
        return ""
    if name.endswith("-32bit") or implementation != "CPython":
        return "PyTorch has no build for %s on %s: %s" % (implementation, name, wanted)
    if name == "macosx-x86_64":
        wanted = "on Apple silicon %s (arm64); an Intel Mac is no longer supported" % wanted
    else:
        wanted = "use Linux (x86-64 or arm64, glibc), macOS 14 or newer (Apple silicon) or Windows (x86-64)"
    return "PyTorch has no build for %s: %s" % (name, wanted)


def host_platform():
    """``linux-x86_64``, ``macosx-arm64``, ``win-amd64``, ...; what torch has no build for is added,
    as in ``-musl``.
    """
    name = sysconfig.get_platform()
    if name.startswith(
        "macosx"
    ):  # Python names the system and processors it was built for, not those it runs on
        is_old = (
            int((platform.mac_ver()[0] or "0").split(".")[0]) < 14 and platform.machine() == "arm64"
        )
        name = "macosx-" + platform.machine() + ("-before-14" if is_old else "")
    if "musl" in (sysconfig.get_config_var("SOABI") or ""):
        name += "-musl"
    return name if sys.maxsize > 2**32 else name + "-32bit"


def ensure_environment(requirement_files, root=ROOT):
    """Make ``root/.venv`` hold what the requirement files (names in ``root``) ask for; return its
    Python.

    The stamp, a JSON file in .venv, names the Python version and the SHA-256 of every installed
    requirement file. It is removed before anything changes and written last: no stamp, or another
    one, means unfinished. An environment whose Python runs is then finished by pip, any other is
    made anew. Runs at the same time wait for one another.
    """
    wanted = {}
    for name in requirement_files:
        with open(os.path.join(root, name), "rb") as file:
            wanted[name] = hashlib.sha256(file.read().replace(b"\r\n", b"\n")).hexdigest()
    folder = os.path.join(root, ".venv")
    python = (
        os.path.join(folder, "Scripts", "python.exe")
        if os.name == "nt"
        else os.path.join(folder, "bin", "python")
    )
    if not _is_ready(folder, python, wanted):
        with _only_one(folder + ".lock"):
            if not _is_ready(
                folder, python, wanted
            ):  # another run may have finished it while this one waited
                _make(root, folder, python, wanted)
    return python


def run(command, variables=None):
    """Run a command in the foreground; return its exit code, 128 + n when signal n ended it.

    Ctrl-C and SIGTERM reach the child, which may still save its work: this waits for it. Ctrl-C
    then gives 130.
    """
    environment = dict(os.environ, PYTHONUTF8="1", PIP_USER="0")
    for name in (
        "PYTHONHOME",
        "PYTHONPATH",
    ):  # they would mix another environment's packages into this one
        environment.pop(name, None)
    environment.update(variables or {})
    sys.stdout.flush()
    process = subprocess.Popen(command, env=environment)
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    code, interrupted = None, False
    try:
        while code is None:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
    return 130 if interrupted else (128 - code if code < 0 else code)


def _is_ready(folder, python, wanted):
    stamp = _read_stamp(folder)
    return (
        set(wanted.items()) <= set(stamp["files"].items())
        and stamp["python"] == _version(python) is not None
    )


def _make(root, folder, python, wanted):
    stamp = _read_stamp(folder)
    with contextlib.suppress(OSError):
        os.remove(os.path.join(folder, STAMP))
    version = _version(python)
    if version is None:
        _create(folder)
        version = _version(python)
    if version is None:
        stop("the Python in %s does not run: delete that folder and start again" % folder)
    _install(root, python, sorted(wanted))
    if stamp["python"] == version:
        wanted = dict(stamp["files"], **wanted)
    unfinished = os.path.join(folder, STAMP + ".new")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump({"python": version, "files": wanted}, file, indent=1, sort_keys=True)
    os.replace(unfinished, os.path.join(folder, STAMP))


def _create(folder):
    try:
        import ensurepip  # noqa: F401  (Debian and Ubuntu ship it apart)
        import venv  # noqa: F401
    except ImportError:
        stop(
            "this Python cannot make environments (no ensurepip or venv): on Debian or Ubuntu run "
            "`sudo apt install python%d.%d-venv`, elsewhere install Python from python.org"
            % sys.version_info[:2]
        )
    print("environment: making %s with Python %s" % (folder, platform.python_version()))
    _check(
        run([sys.executable, "-m", "venv", "--clear", folder]), "Python could not make " + folder
    )


def _install(root, python, names):
    if sys.platform == "linux" and not shutil.which("nvidia-smi"):
        print(
            "environment: there is no NVIDIA GPU here; should pip start to download gigabytes of CUDA packages,"
        )
        print(
            "             press Ctrl-C, set PIP_EXTRA_INDEX_URL to the CPU index that pytorch.org names, start again"
        )
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    files = [os.path.join(root, name) for name in names]
    for path in files:
        with open(path, encoding="utf-8") as file:
            pins = [line.strip() for line in file if line.startswith("torch==")]
        for pin in pins:  # first and alone: whatever needs torch then finds this one and brings no other build along
            print("environment: installing %s, the largest part" % pin)
            _check(run(pip + [pin]), "pip could not install " + pin)
    print("environment: installing %s" % ", ".join(names))
    _check(
        run(pip + [word for path in files for word in ("-r", path)]),
        "pip could not install " + " and ".join(names),
    )


def _check(code, failure):
    if code == 130:
        raise KeyboardInterrupt
    if code:
        stop(
            failure
            + ": its messages are above; check network and disk space, then start again to go on from here"
        )


def _read_stamp(folder):
    try:
        with open(os.path.join(folder, STAMP), encoding="utf-8") as file:
            stamp = json.load(file)
        return {"python": stamp["python"], "files": dict(stamp["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"python": None, "files": {}}


def _version(python):
    """``3.12`` for an environment's Python that runs and has pip, else None."""
    # The list of pip's files is what its installation writes last: an interrupted one can be
    # imported but lacks it.
    question = "import sys; from importlib.metadata import files; files('pip')[0]; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.check_output([python, "-I", "-c", question], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.decode("ascii").strip()


@contextlib.contextmanager
def _only_one(path):
    with open(path, "a") as file:
        if not try_lock(file):
            print("environment: another run is preparing it; waiting")
            while not try_lock(file):
                time.sleep(0.5)
        yield
