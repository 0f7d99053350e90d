"""Options become flags, mistakes become one line, and files are whole or as they were."""

import io
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from core.errors import Stopped, UserError, run
from core.files import atomic_write
from core.options import RETIRED_FLAGS, option, parse, require
from core.paths import REPOSITORY, lora_path, lora_paths, skill_of


@dataclass
class Example:
    """An example."""

    count: int = option(3, "a number, 5 % of something")
    rate: float | None = option(None, "a rate")
    name: str = option("x", "a name")
    fast: bool = option(True, "a switch")
    kind: Literal["a", "b"] = option("a", "a choice")
    files: tuple[Path, ...] = option((Path("f"),), "some files")

    def __post_init__(self):
        require(self.count < 100, f"--count {self.count} must be below 100")


def test_the_dataclass_is_the_only_source_of_defaults():
    assert parse(Example, []) == Example()


def test_every_type_parses_and_booleans_are_real_booleans():
    argv = ["--count", "-4", "--rate", "1e-3", "--name=y z", "--no-fast", "--kind", "b", "--files", "p", "q"]
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
        (["--fas"], "unknown flag --fas; did you mean --fast?"),
        (["--zzz=1"], "unknown flag --zzz; see --help"),
        (["--count", "100"], "--count 100 must be below 100"),
        *((flag.split(), f"{flag} is gone") for flag in RETIRED_FLAGS),
    ],
)
def test_wrong_flags_are_explained(argv, said):
    with pytest.raises(UserError) as error:
        parse(Example, argv)
    assert said in str(error.value)


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Example, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for text in ("a number, 5 % of something (default: 3)", "--no-fast", "{a,b}", "some files (default: f)"):
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


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "folder" / "file.bin"
    atomic_write(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*file\.bin: No space left on device"):
        atomic_write(path, fails)
    assert path.read_bytes() == b"old"
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
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    program = "import os, sys; from pathlib import Path; from core.files import atomic_write\n"
    program += "atomic_write(Path(sys.argv[1]), lambda f: (f.write(b'half'), f.flush(), os._exit(9)))"
    killed = subprocess.run([sys.executable, "-c", program, str(path)], cwd=REPOSITORY)
    assert killed.returncode == 9
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_written_files_have_the_permissions_of_ordinary_ones(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    atomic_write(tmp_path / "atomic", lambda file: file.write(b""))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


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
    for name in ("", "../x", "a/b", "a\\b", "/abs", ".hidden", "lora_", "a b", "a\0b", "*"):
        with pytest.raises(UserError, match="is not a skill name"):
            lora_path(tmp_path, name, 64)
