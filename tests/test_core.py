"""Options become flags, mistakes become one line, and files are whole or as they were."""

import hashlib
import io
import json
import os
import shlex
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from core import files
from core.errors import Stopped, UserError, run
from core.files import atomic_write, sha256_file
from core.options import RETIRED_FLAGS, CheckedOptions, option, parse
from core.paths import REPOSITORY, lora_path, lora_paths, skill_name, skill_of


@dataclass
class Example(CheckedOptions):
    """An example."""

    count: int = option(3, "a number, 5 % of something", group="data", below=100)
    rate: float | None = option(None, "a rate", above=0)
    name: str = option("x", "a name")
    fast: bool = option(True, "a switch")
    kind: Literal["a", "b"] = option("a", "a choice")
    files: tuple[Path, ...] = option((Path("f"),), "some files")


def test_the_dataclass_is_the_only_source_of_defaults():
    assert parse(Example, []) == Example()


def test_every_type_parses_and_booleans_are_real_booleans():
    argv = [
        "--count",
        "-4",
        "--rate",
        "1e-3",
        "--name=y z",
        "--no-fast",
        "--kind",
        "b",
        "--files",
        "p",
        "q",
    ]
    assert parse(Example, argv) == Example(-4, 1e-3, "y z", False, "b", (Path("p"), Path("q")))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--count", "1.5"], "--count: '1.5' is not a whole number"),
        (["--count", "1_0"], "is not a whole number"),
        (["--count"], "expected one argument"),
        (["--rate", "fast"], "invalid float value"),
        (["--kind", "c"], "invalid choice"),
        (["--fast", "False"], "unexpected argument 'False'"),
        (
            ["--files", "p", "--count", "1", "--files", "q"],
            "--files is given twice: write all its values after one",
        ),
        (["--fas"], "unknown flag --fas; did you mean --fast?"),
        (["--zzz=1"], "unknown flag --zzz; see --help"),
        (["--count", "100"], "count=100 must be below 100"),
        *((flag.split(), f"{flag} is gone") for flag in RETIRED_FLAGS),
    ],
)
def test_wrong_flags_are_explained(argv, said):
    with pytest.raises(UserError) as error:
        parse(Example, argv)
    assert said in str(error.value)


@dataclass
class Heir(Example):
    """Another default, and nothing else said again."""

    kind: Literal["b", "c"] = option("c", "a choice")
    count: int = 4
    rate: float | None = 0.5


@pytest.mark.parametrize(
    "values",
    [
        {"count": 100},
        {"count": 1.5},
        {"count": True},
        {"count": 10**400},
        {"rate": 0},
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"rate": "fast"},
        {"kind": "a"},
    ],
)
def test_a_dataclass_refuses_what_its_options_exclude_whoever_makes_it(values):
    ((name, value),) = values.items()
    with pytest.raises(UserError, match=rf"^{name}={value!r} must be "):
        Heir(**values)
    assert Heir(rate=None).count == 4


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Example, ["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert printed.index("--files") < printed.index("\ndata:\n") < printed.index("--count")
    printed = " ".join(printed.split())
    for text in (
        "a number, 5 % of something (default: 3)",
        "--no-fast",
        "{a,b}",
        "some files (default: f)",
    ):
        assert text in printed


def test_a_bug_keeps_its_traceback_and_a_mistake_is_one_line(capsys):
    def mistaken():
        raise UserError("one\nsentence")

    with pytest.raises(SystemExit) as stopped:
        run(mistaken)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: one sentence\n"
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    with pytest.raises(ModuleNotFoundError):
        run(lambda: __import__("a_module_that_nobody_asked_for"))
    assert run(lambda: None) is None


def test_a_mistake_has_its_exit_code_even_if_nobody_can_be_told(monkeypatch):
    def mistaken():
        raise UserError("one sentence")

    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as unread, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", io.TextIOWrapper(unread, write_through=True))
        with pytest.raises(SystemExit) as stopped:
            run(mistaken)
    assert stopped.value.code == 2


def test_ctrl_c_is_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run(interrupted)
    assert stopped.value.code == 130


def test_work_that_a_signal_stopped_has_the_code_that_shells_give(capsys):
    def stopped_work():
        raise Stopped(15)

    with pytest.raises(SystemExit) as stopped:
        run(stopped_work)
    assert stopped.value.code == 143
    assert capsys.readouterr().err == ""  # it has said so itself


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            PermissionError(13, "Permission denied", "closed.jsonl"),
            "closed.jsonl: Permission denied",
        ),
        (OSError(36, "File name too long", "x" * 300), "File name too long"),
        (OSError(28, "No space left on device"), "the output, or a file: No space left on device"),
        (MemoryError(), "the memory does not suffice"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "the memory does not suffice",
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
            "the memory does not suffice",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "(CUDA out of memory. Tried): take a smaller",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(raised, said, capsys, monkeypatch):
    def work():
        raise raised

    monkeypatch.setattr("core.errors.drop", lambda stream: None)
    with pytest.raises(SystemExit) as ended:
        run(work)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "bug",
    [
        FileNotFoundError(2, "No such file", "x"),
        OSError(5, "Input/output error"),
        RuntimeError("x"),
    ],
)
def test_bugs_keep_their_traceback(bug):
    def work():
        raise bug

    with pytest.raises(type(bug)):
        run(work)


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes the streams")
def test_closed_streams_and_a_full_disk_behind_the_output():
    program = (
        "import sys; from core.errors import run; run(lambda: print(sys.stdin.read(), 'said'))"
    )
    command = [sys.executable, "-c", program]
    shell = {"shell": True, "cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 60}
    quoted = shlex.join(command)
    assert subprocess.run(f"{quoted} <&- >&-", **shell).returncode == 0
    if os.path.exists("/dev/full"):
        full = subprocess.run(f"{quoted} </dev/null >/dev/full", **shell)
        assert full.returncode == 2
        assert (
            full.stderr.startswith("error: the output, or a file: No space left")
            and full.stderr.count("\n") == 1
        )


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "folder" / "file.bin"
    atomic_write(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*file\.bin: No space left on device"):
        atomic_write(path, fails)
    assert path.read_bytes() == b"old"

    def cannot_read_its_source(file):
        try:
            raise OSError("not gzipped")
        except OSError as error:
            raise UserError("texts.gz is no gzip file") from error

    with pytest.raises(UserError, match=r"^texts\.gz is no gzip file$"):
        atomic_write(path, cannot_read_its_source)
    assert [item.name for item in path.parent.iterdir()] == ["file.bin"]
    atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_the_disk_s_error_is_found_behind_torch_s_own_but_not_in_what_the_caller_handles(tmp_path):
    def like_torch_save(file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # what its closing raises on top

    with pytest.raises(UserError, match="No space left on device"):
        atomic_write(tmp_path / "a", like_torch_save)

    def buggy(file):
        raise ValueError("a bug")

    try:
        raise OSError(2, "handled by the caller")
    except OSError:
        with pytest.raises(ValueError, match="a bug"):
            atomic_write(tmp_path / "a", buggy)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_leaves_ends_the_command_quietly():
    program = "from core.errors import run; run(lambda: [print('x' * 1000, flush=True) for _ in range(10_000)])"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    program = "import os, sys; from pathlib import Path; from core.files import atomic_write\n"
    program += (
        "atomic_write(Path(sys.argv[1]), lambda f: (f.write(b'half'), f.flush(), os._exit(9)))"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], cwd=REPOSITORY)
    assert killed.returncode == 9
    assert path.read_bytes() == b"old"
    (tmp_path / ".file.binary.12345678").touch()
    others = {".file.binary.12345678", "file.bin"}
    assert len(list(tmp_path.iterdir())) == 3
    atomic_write(path, lambda file: file.write(b"new"))
    assert {item.name for item in tmp_path.iterdir()} == others, (
        "a later write clears away what the killed one left"
    )


def test_a_live_write_keeps_its_file_while_another_one_writes(tmp_path):
    path = tmp_path / "file.bin"
    program = "import sys; from pathlib import Path; from core.files import atomic_write\n"
    program += "wait = lambda: (print(flush=True), sys.stdin.readline())\n"
    program += "atomic_write(Path(sys.argv[1]), lambda f: (wait(), f.write(b'one'), f.flush(), wait(), f.write(b'two')))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=REPOSITORY, **pipes
    ) as other:
        for _ in range(2):  # when its file is still empty, and when it is half written
            other.stdout.readline()
            atomic_write(path, lambda file: file.write(b"mine"))
            assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2
            other.stdin.write(b"\n")
            other.stdin.flush()
    assert other.returncode == 0 and path.read_bytes() == b"onetwo"
    assert [item.name for item in tmp_path.iterdir()] == ["file.bin"]


def test_an_empty_file_is_left_alone_while_its_writer_may_still_lock_it(tmp_path):
    young, old = tmp_path / ".a.12345678", tmp_path / ".a.87654321"
    young.touch()
    old.touch()
    os.utime(old, (time.time() - 120,) * 2)
    atomic_write(tmp_path / "a", lambda file: None)
    assert young.exists() and not old.exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_written_files_have_the_permissions_of_ordinary_ones(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    atomic_write(tmp_path / "atomic", lambda file: file.write(b""))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


@pytest.fixture
def later(monkeypatch):
    """An hour has passed since every file was written."""
    now = files.time.time_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: now() + 3600 * 10**9)


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, later, monkeypatch):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(b"old")
    assert sha256_file(path, cache) == sha(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(files.hashlib, "sha256", None)  # whoever hashes again fails
        remembered = sha256_file(path, cache), sha256_file(cache / ".." / "a.jsonl", cache)
    assert set(remembered) == {sha(b"old")}
    other = tmp_path / "b.jsonl"
    other.write_bytes(b"other")
    kept = sha256_file(other, cache)
    assert kept == sha(b"other")
    status = path.stat()
    for content, time_ns in (
        (b"longer", status.st_mtime_ns),
        (b"newest", status.st_mtime_ns + 1000),
    ):
        path.write_bytes(content)
        os.utime(
            path, ns=(status.st_atime_ns, time_ns)
        )  # one at a time: the size alone, then the time alone
        assert sha256_file(path, cache) == sha256_file(path) == sha(content)
    monkeypatch.setattr(files.hashlib, "sha256", None)
    assert sha256_file(other, cache) == kept, "one file's change makes nobody forget another"


def test_a_file_just_written_is_not_remembered(tmp_path):
    """Its next change may leave size and time as they are."""
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(b"old")
    status = path.stat()
    assert sha256_file(path, cache) == sha(b"old") and not cache.exists()
    path.write_bytes(b"new")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256_file(path, cache) == sha(b"new")


@pytest.mark.parametrize("memo", ["", "[]", '{"a": ', "null", "\x00", "{p: [1]}", "{p: null}"])
def test_a_harmed_or_deleted_memory_costs_only_time(tmp_path, later, memo):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(b"old")
    sha256_file(path, cache)
    (cache / "sha256.json").write_text(
        memo.replace("p:", json.dumps(str(path.resolve())) + ":"), encoding="utf-8"
    )
    assert sha256_file(path, cache) == sha(b"old")
    (cache / "sha256.json").unlink()
    assert sha256_file(path, cache) == sha(b"old")


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path, later):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(b"old")
    cache.touch()  # no folder
    assert sha256_file(path, cache) == sha(b"old")


def test_skill_names_and_files_name_each_other(tmp_path):
    assert lora_path("out", "medical", 512) == lora_path("out", "lora_medical", 512)
    assert lora_path("out", "medical", 512) == Path("out/lora/lora_medical_512.pth")
    for name in ("a", "two", "two_words", "v1.2-x", "医疗"):
        path = lora_path(tmp_path, name, 64)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert skill_of(path) == name
        assert lora_paths(tmp_path, name) == [path]
    assert len(lora_paths(tmp_path)) == 5
    assert lora_paths(tmp_path, "lora_two") == [lora_path(tmp_path, "two", 64)]
    (tmp_path / "lora" / "lora_folder_64.pth").mkdir()
    assert len(lora_paths(tmp_path)) == 5
    assert skill_name("字" * 33) == "字" * 33
    with pytest.raises(UserError, match="is not a skill name"):
        skill_name(
            "字" * 34
        )  # 102 bytes: with a temporary file's additions more than some file systems take
    for name in ("", "../x", "a/b", "a\\b", "/abs", ".hidden", "lora_", "a b", "a\0b", "*"):
        with pytest.raises(UserError, match="is not a skill name"):
            lora_path(tmp_path, name, 64)
