"""Options become flags, mistakes become one line, and files are whole or as they were."""

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch

from core import files
from core.errors import Stopped, UserError, run
from core.files import atomic_write, publish, sha256_file, unfinished
from core.options import RETIRED_FLAGS, CheckedOptions, option, parse
from core.paths import REPOSITORY, lora_path, lora_paths, skill_name, skill_of
from core.threads import LONG, NAMES, SHORT, is_quiet


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
    words = "--count -4 --rate 1e-3 --name=y --no-fast --kind b --files p q"
    wanted = Example(-4, 1e-3, "y", False, "b", (Path("p"), Path("q")))
    assert parse(Example, words.split()) == wanted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--count 1.5", "--count: '1.5' is not a whole number"),
        ("--count 1_0", "is not a whole number"),
        ("--count=--5", "is not a whole number"),
        ("--count ٣٢", "is not a whole number"),
        ("--count", "expected one argument"),
        ("--rate fast", "invalid float value"),
        ("--kind c", "invalid choice"),
        ("--fast False", "unexpected argument 'False'"),
        ("--files p --count 1 --files q", "--files is given twice"),
        ("--fas", "unknown flag --fas; did you mean --fast?"),
        ("--zzz=1", "unknown flag --zzz; see --help"),
        ("--count 100", "count=100 must be below 100"),
        *((flag, f"{flag} is gone") for flag in RETIRED_FLAGS),
    ],
)
def test_wrong_flags_are_explained(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse(Example, words.split())


@dataclass
class Heir(Example):
    """Another default, and nothing else said again."""

    kind: Literal["b", "c"] = option("c", "a choice")
    count: int = 4
    rate: float | None = 0.5


WRONG = [("count", value) for value in (100, 1.5, True, 10**400)]
WRONG += [("rate", value) for value in (0, float("nan"), float("inf"), "fast")]


@pytest.mark.parametrize(("name", "value"), [*WRONG, ("kind", "a")])
def test_a_dataclass_refuses_what_its_options_exclude_whoever_makes_it(name, value):
    with pytest.raises(UserError, match=rf"^{name}={value!r} must be "):
        Heir(**{name: value})
    assert Heir(rate=None).count == 4


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Example, ["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert printed.index("--files") < printed.index("\ndata:\n") < printed.index("--count")
    printed = " ".join(printed.split())
    for text in ("5 % of something (default: 3)", "--no-fast", "{a,b}", "files (default: f)"):
        assert text in printed


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("one\nsentence"), 2, "one sentence"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped(15), 143, None),  # it has said so itself
        (PermissionError(13, "denied", "closed.jsonl"), 2, "closed.jsonl: denied"),
        (OSError(36, "File name too long", "x" * 300), 2, "File name too long"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ModuleNotFoundError(name="torch.nn"), 2, "'torch'"),
        (MemoryError(), 2, "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 2, "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "memory. Tried)"),
    ],
)
@pytest.mark.parametrize("keep_working", [False, True])
def test_a_mistake_is_one_line_and_has_its_exit_code(raised, code, said, keep_working, capsys):
    def work():
        raise raised

    with pytest.raises(SystemExit) as ended:
        run(work, keep_working=keep_working)
    error = capsys.readouterr().err
    assert ended.value.code == code
    assert (said in error and error.count("\n") == 1) if said else not error


@pytest.mark.parametrize(
    "bug",
    [
        ZeroDivisionError(),
        FileNotFoundError(2, "No such file", "x"),
        OSError(5, "Input/output error"),
        RuntimeError("x"),
        ModuleNotFoundError(name="a_module_that_nobody_asked_for"),
    ],
)
def test_a_bug_keeps_its_traceback(bug):
    def work():
        raise bug

    with pytest.raises(type(bug)):
        run(work)


def test_nobody_need_be_there_to_read(monkeypatch):
    """A Ctrl-C ends `| tee` too, and before the run: training goes on, other commands end."""
    reading, writing = os.pipe()
    os.close(reading)
    done = []

    def work(prints):
        if prints:
            print("first", flush=True)
            print("second", file=sys.stderr)
        done.append("work")
        raise UserError("one sentence")

    codes = []
    for keep_working, prints in ((True, True), (False, True), (False, False)):
        pipe = os.fdopen(os.dup(writing), "wb", buffering=0)
        unread = io.TextIOWrapper(pipe, encoding="utf-8", write_through=True)
        with pipe, monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "stdout", unread)
            patch.setattr(sys, "stderr", unread)
            run(partial(work, prints), keep_working=keep_working)
        codes.append(ended.value.code)
    os.close(writing)
    assert (codes, done) == ([2, 141, 2], ["work", "work"])


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize(
    "chosen", [{}, SHORT, LONG, {"OMP_WAIT_POLICY": "active"}, {NAMES[0]: "7"}]
)
def test_threads_that_wait_spin_as_the_user_decided_or_the_machine_allows(
    quiet, chosen, monkeypatch
):
    monkeypatch.setattr("core.threads.is_quiet", lambda: quiet)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    found = []
    run(lambda: found.append({name: os.environ[name] for name in NAMES if name in os.environ}))
    decided = chosen in ({}, SHORT, LONG)
    assert found == [(LONG if quiet else SHORT) if decided else chosen]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this is about Linux")
def test_a_machine_is_quiet_while_its_cores_idle(tmp_path, monkeypatch):
    stat, cores = tmp_path / "stat", sorted(os.sched_getaffinity(0))
    other = max(cores) + 1  # a core that belongs to others, and is busy

    def written(worked: int, idle: int) -> None:
        lines = [f"cpu{n} {worked} 0 0 {idle} 0 0 0 0 0 0" for n in cores]
        stat.write_text(
            "\n".join(["cpu 9 9 9 9", *lines, f"cpu{other} {10 * worked} 0 0 0 0 0 0 0"])
        )

    answers = []
    for share in (0, 100):
        written(100, 100)
        monkeypatch.setattr("time.sleep", lambda _, s=share: written(100 + s, 300 - s))
        answers.append(is_quiet(stat))
    assert answers == [True, False]
    assert not is_quiet(tmp_path / "missing")


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes the streams")
def test_closed_streams_and_a_full_disk_behind_the_output():
    program = "import sys; from core.errors import run; run(lambda: print(sys.stdin.read(), 'x'))"
    command = [sys.executable, "-c", program]
    shell = {"shell": True, "cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 60}
    quoted = shlex.join(command)
    assert subprocess.run(f"{quoted} <&- >&-", **shell).returncode == 0
    if os.path.exists("/dev/full"):
        full = subprocess.run(f"{quoted} </dev/null >/dev/full", **shell)
        assert (full.returncode, full.stderr.count("\n")) == (2, 1)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "folder" / "file.bin"
    atomic_write(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"file\.bin: No space left on device"):
        atomic_write(path, fails)
    assert path.read_bytes() == b"old"

    def cannot_read_its_source(file):
        try:
            raise OSError("not gzipped")
        except OSError as error:
            raise UserError("texts.gz is no gzip file") from error

    with pytest.raises(UserError, match=r"^texts\.gz "):
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


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (OSError(28, "No space left on device"), UserError, "cannot write .*x: No space left"),
        (Exception("I/O error: File too large (os error 27)"), UserError, "File too large"),
        (UserError("its own words"), UserError, "^its own words$"),
        (TypeError("a bug"), TypeError, "a bug"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ],
)
def test_an_unfinished_folder_goes_and_what_was_there_stays(tmp_path, raised, kind, said):
    path, left = tmp_path / "x", tmp_path / ".x.unfinished" / "half"
    path.write_text("old")
    left.parent.mkdir()
    left.write_text("of a killed process")
    with pytest.raises(kind, match=said), unfinished(path) as folder:
        assert folder == left.parent and not list(folder.iterdir())
        left.write_text("new")
        raise raised
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


def test_nothing_is_published_over_what_is_there_even_a_link_to_nothing(tmp_path):
    new, link = tmp_path / "new", tmp_path / "link"
    new.mkdir()
    (tmp_path / "folder").mkdir()
    try:
        link.symlink_to(tmp_path / "nothing")
    except OSError:
        link.write_text("Windows allows links to few")
    for path in (link, tmp_path / "folder"):
        with pytest.raises(UserError, match=f"{path.name} exists"):
            publish({new: path})
    publish({new: tmp_path / "free"})
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "free", "link"}


@pytest.mark.parametrize("there", [False, True])
def test_several_are_published_all_or_none_and_no_empty_folder_stays(tmp_path, there):
    path = tmp_path / "new" / "deep" / "x"
    with contextlib.suppress(UserError), unfinished(path) as folder:
        places = {folder / name: path.with_name(name) for name in ("one", "two", "three")}
        for written in places:
            written.write_text("mine")
        if there:
            (tmp_path / "three").write_text("theirs")
            places[folder / "three"] = tmp_path / "three"
        publish(places)
    found = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*")}
    if there:
        assert found.keys() == {"three"} and found["three"].read_text() == "theirs"
    else:
        names = ("one", "two", "three")
        assert found.keys() == {"new", "new/deep", *(f"new/deep/{name}" for name in names)}
    with unfinished(tmp_path / "other" / "x"):
        pass
    assert not (tmp_path / "other").exists()


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


WRITER = """
import sys
from pathlib import Path
from core.files import atomic_write

def write(file):
    for word in (b"one", b"two"):
        print(flush=True)
        sys.stdin.readline()
        file.write(word)
        file.flush()

atomic_write(Path(sys.argv[1]), write)
"""


def test_a_live_write_keeps_its_file_while_another_one_writes(tmp_path):
    path = tmp_path / "file.bin"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as other:
        for _ in range(2):  # when its file is still empty, and when it is half written
            other.stdout.readline()
            atomic_write(path, lambda file: file.write(b"mine"))
            assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2
            other.stdin.write(b"\n")
            other.stdin.flush()
    assert other.returncode == 0 and path.read_bytes() == b"onetwo"

    def interrupted(file):  # by another write of the same process
        file.write(b"one")
        file.flush()
        atomic_write(path, lambda file: file.write(b"mine"))
        file.write(b"two")

    atomic_write(path, interrupted)
    assert path.read_bytes() == b"onetwo"
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


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, later):
    path, other, cache = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "cache"
    path.write_bytes(b"old")
    other.write_bytes(b"other")
    assert [sha256_file(one, cache) for one in (path, other)] == [sha(b"old"), sha(b"other")]
    memo = cache / "sha256.json"
    kept = memo.read_text(encoding="utf-8")
    for content in (b"old", b"other"):
        kept = kept.replace(sha(content), f"of {content.decode()}")
    memo.write_text(kept, encoding="utf-8")
    assert sha256_file(path, cache) == sha256_file(cache / ".." / "a.jsonl", cache) == "of old"
    status = path.stat()
    # One at a time: the size alone, then the time alone.
    for content, mtime in ((b"longer", status.st_mtime_ns), (b"newest", status.st_mtime_ns + 1000)):
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, mtime))
        assert sha256_file(path, cache) == sha(content)
    assert sha256_file(other, cache) == "of other", "a file's change makes nobody forget another"


def test_a_file_just_written_is_not_remembered(tmp_path):
    """Its next change may leave size and time as they are."""
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(b"old")
    status = path.stat()
    assert sha256_file(path, cache) == sha(b"old") and not cache.exists()
    path.write_bytes(b"new")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256_file(path, cache) == sha(b"new")


@pytest.mark.parametrize("memo", ["[]", '{"a": ', "null", "\x00", "{p: [1]}", "{p: null}", None])
def test_a_memory_that_is_harmed_or_cannot_be_written_costs_only_time(tmp_path, later, memo):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(b"old")
    if memo is None:
        cache.touch()  # no folder
    else:
        cache.mkdir()
        harmed = memo.replace("p:", json.dumps(str(path.resolve())) + ":")
        (cache / "sha256.json").write_text(harmed, encoding="utf-8")
    assert sha256_file(path, cache) == sha256_file(path, cache) == sha(b"old")


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
    for name in ("off", "base"):  # which the chat and the tables give another meaning
        (tmp_path / "lora" / f"lora_{name}_64.pth").touch()
    assert len(lora_paths(tmp_path)) == 5
    assert skill_name("字" * 33) == "字" * 33
    with pytest.raises(UserError, match="is not a skill name"):
        skill_name(
            "字" * 34
        )  # 102 bytes: with a temporary file's additions more than some file systems take
    for name in ("", "../x", "a/b", "a\\b", "/abs", ".hidden", "lora_", "a b", "a\0b", "*", "base"):
        with pytest.raises(UserError, match="is not a skill name"):
            lora_path(tmp_path, name, 64)
