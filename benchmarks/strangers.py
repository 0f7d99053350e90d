"""Hostile files through every door that reads strangers' files: python benchmarks/strangers.py

Each must be refused with its reason, run nothing, and cost little. On Linux the memory is measured,
too. Exit code 1: one was not refused so.
"""

import io
import json
import os
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import eval_model
import train_full_sft
import train_lora
from benchmarks.result_file import measured_on, write_results
from benchmarks.seeded_model import add_seeded_lora, seeded_model
from core.errors import UserError, run
from core.options import CheckedOptions, option, parse
from core.paths import REPOSITORY, TOKENIZER_DIR, bundled_data, lora_path
from dataset.tokenizer import load_tokenizer, tokenizer_fingerprint
from model.lora.skill_file import SkillMeta, save_lora
from model.weights import RunRecord, save_base
from scripts import compatibility, convert_model, eval_benchmark, merge_lora, report
from scripts.quickstart_stages import flag_words

MEMORY = "megabytes"
SECONDS, MEGABYTES = 2.0, 200.0  # the most that a refusal may take
SHAPE = {"dim": 64, "n_layers": 2, "vocab_size": 6400, "max_seq_len": 256}
NAME = "layers.0.attention.wq.lora.A.weight"  # of a tensor that every reader would look at
EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
HUGE = 1 << 40
ZEROS = [bytes(1 << 20)] * 64
DEEP = "[" * 100_000
MANY = 1 << 20  # layers, the most that a config may say


class Touch:
    """Unpickling this makes the file ``path``."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plain(path: Path, tensor: torch.Tensor | None = None) -> None:
    """One tensor, as a state dict."""
    torch.save({NAME: torch.ones(3) if tensor is None else tensor}, path)


def added(path: Path, name: str, parts: Iterable[bytes], method=zipfile.ZIP_STORED) -> None:
    """A plain archive with one more entry."""
    plain(path)
    settings = {"compression": method, "compresslevel": 1}
    with zipfile.ZipFile(path, "a", **settings) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a name that is there
        with file.open(name, "w") as opened:
            for part in parts:
                opened.write(part)


def replaced(path: Path, name: str, data: bytes) -> None:
    """The archive of a thousand numbers, with other data in the entry ``name``."""
    plain(path, torch.ones(1000))
    with zipfile.ZipFile(path) as file:
        entries = {entry.filename: file.read(entry) for entry in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for each, content in entries.items():
            file.writestr(each, data if each.endswith(f"/{name}") else content)


def nested() -> bytes:
    """A pickle of a tuple of the same tuple twice, and so on: hashing it would take for ever."""
    steps = b"".join(b"h%ch%c\x86q%c0" % (n, n, n + 1) for n in range(60))
    return b"\x80\x02)q\x000" + steps + b"}h\x3cK\x01s."


def header(path: Path, content: str, length: int | None = None) -> None:
    """Write a safetensors file with this header, and perhaps another length of it."""
    text = content.encode()
    path.write_bytes(struct.pack("<Q", length or len(text)) + text + bytes(4))


def entry(**changed) -> str:
    """A header of one tensor."""
    return json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changed})


def change(path: Path, part: str | None = None, **changed) -> None:
    """Change entries of a good JSON file, or of one of its parts."""
    content = json.loads(path.read_text(encoding="utf-8"))
    (content if part is None else content[part]).update(changed)
    path.write_text(json.dumps(content), encoding="utf-8")


# How to make each file (at a path, with a canary for what runs), and what its refusal says.
Files = dict[str, tuple[Callable[[Path, Path], object], str]]
CODE, ODD, TABLE = "it holds more than tensors", "compressed, doubled or misplaced", "no table"
READ, JSON, UNREAD = "not a readable weights file", "describes no possible model", "deserializing"
ARCHIVES: Files = {
    "code among the tensors": (lambda p, c: torch.save({NAME: Touch(c)}, p), CODE),
    "code instead of them": (lambda p, c: torch.save(Touch(c), p), CODE),
    "code, protocol 4": (lambda p, c: torch.save(Touch(c), p, pickle_protocol=4), CODE),
    "torch's own loader": (lambda p, c: torch.save({NAME: torch.load}, p), CODE),
    "zip bomb": (lambda p, c: added(p, f"{p.stem}/data/1", ZEROS, zipfile.ZIP_DEFLATED), ODD),
    "bzip2 bomb": (lambda p, c: added(p, f"{p.stem}/data/1", ZEROS, zipfile.ZIP_BZIP2), ODD),
    "compressed": (lambda p, c: added(p, f"{p.stem}/data/1", [bytes(99)], zipfile.ZIP_LZMA), ODD),
    "path names": (lambda p, c: added(p, "../../evil", [b"x"]), ODD),
    "two tables": (lambda p, c: added(p, f"{p.stem}/DATA.PKL", [b"x"]), ODD),
    "nested tuples": (lambda p, c: replaced(p, "data.pkl", nested()), CODE),
    "doubled entries": (lambda p, c: added(p, f"{p.stem}/data.pkl", [b"x"]), ODD),
    "polyglot": (lambda p, c: (plain(p), p.write_bytes(b"GIF89a" + p.read_bytes())), ODD),
    "huge table": (lambda p, c: torch.save({"x" * (17 << 20): torch.ones(1)}, p), TABLE),
    "legacy format": (
        lambda p, c: torch.save(Touch(c), p, _use_new_zipfile_serialization=False),
        READ,
    ),
    "sparse tensor": (lambda p, c: plain(p, torch.eye(4).to_sparse()), CODE),
    "huge by strides": (lambda p, c: plain(p, torch.ones(1).expand(HUGE)), "larger than"),
    "huge by its table": (lambda p, c: replaced(p, "data/0", bytes(12)), READ),
    "NaN": (lambda p, c: plain(p, torch.full((4, 4), torch.nan)), "NaN or infinity"),
    "eight bits": (lambda p, c: plain(p, torch.eye(4).to(torch.float8_e4m3fn)), "as torch.float8"),
    "no storage": (lambda p, c: plain(p, torch.eye(4).to("meta")), "no dense tensor"),
    "truncated": (lambda p, c: (plain(p), p.write_bytes(p.read_bytes()[:-30])), READ),
}
HEADERS: Files = {
    "endless header": (lambda p, c: header(p, entry(), 1 << 60), UNREAD),
    "header past the end": (lambda p, c: header(p, entry(), 1 << 20), UNREAD),
    "data past the end": (lambda p, c: header(p, entry(data_offsets=[0, HUGE])), UNREAD),
    "huge shape": (lambda p, c: header(p, entry(shape=[HUGE, HUGE])), UNREAD),
    "hole": (lambda p, c: header(p, entry(data_offsets=[4, 8])), UNREAD),
    "deep header": (lambda p, c: header(p, DEEP), UNREAD),
    "a pickle instead": (lambda p, c: torch.save(Touch(c), p), UNREAD),
}
RECORDS: Files = {
    "deep": (lambda p, c: p.write_text(DEEP), "describes no base"),
    "layers": (lambda p, c: change(p, "config", n_layers=MANY), "does not fit the model"),
    "width": (lambda p, c: change(p, "config", dim=MANY), "does not fit the model"),
    "context": (lambda p, c: change(p, "config", max_seq_len=10**400), JSON),
}
CONFIGS: Files = {
    "deep": (lambda p, c: p.write_text(DEEP), "is no model's config"),
    "layers": (lambda p, c: change(p, num_hidden_layers=MANY), "tensors; copy it again"),
    "width": (lambda p, c: change(p, hidden_size=HUGE), JSON),
}
SETTINGS: Files = {
    "deep": (lambda p, c: p.write_text(DEEP), "is no adapter's config"),
    "rank": (lambda p, c: change(p, r=HUGE), "does not fit"),
    "expression": (lambda p, c: change(p, alpha_pattern={"(.*)*(.*)*x$": 1}), "may never end"),
}
CHATS = str(bundled_data("my_skill_example.jsonl"))
BASE = "--base {f}/full_sft_64.pth --out_dir {f}"
# What reads the file, where it is, which there are, and with which flags it is read.
DOORS: dict[str, tuple[Callable, str, Files, str]] = {
    "eval_model --base": (eval_model.main, "x.pth", ARCHIVES, "--base {f}/x.pth --prompt x"),
    "eval_model --base, record": (
        eval_model.main,
        "full_sft_64.json",
        RECORDS,
        f"{BASE} --prompt x",
    ),
    "eval_model --base, folder": (
        eval_model.main,
        "llama/model.safetensors",
        HEADERS,
        "--base {f}/llama --prompt x",
    ),
    "eval_model --lora_name": (
        eval_model.main,
        "lora/lora_x_64.pth",
        ARCHIVES,
        f"{BASE} --lora_name x --prompt x",
    ),
    "train_lora --base": (
        train_lora.main,
        "x.pth",
        ARCHIVES,
        "--base {f}/x.pth --out_dir {f} --lora_name y --data_path {chats}",
    ),
    "train_full_sft --base": (
        train_full_sft.main,
        "x.pth",
        ARCHIVES,
        "--base {f}/x.pth --out_dir {f} --data_path {chats}",
    ),
    "eval_benchmark": (
        eval_benchmark.main,
        "x.pth",
        ARCHIVES,
        "{chats} --base {f}/x.pth --out_dir {f}",
    ),
    "report --skills": (
        report.main,
        "lora/lora_x_64.pth",
        ARCHIVES,
        f"{BASE} --skills x",
    ),
    "merge_lora": (
        merge_lora.main,
        "lora/lora_x_64.pth",
        ARCHIVES,
        f"x {BASE} --output {{f}}/new.pth",
    ),
    "compatibility": (compatibility.main, "lora/lora_x_64.pth", ARCHIVES, f"{BASE} --lora_name x"),
    "--from minimind": (
        convert_model.main,
        "x.pth",
        ARCHIVES,
        "--from minimind --source {f}/x.pth --output {f}/new/x.pth",
    ),
    "--from minimind --lora_name": (
        convert_model.main,
        "x.pth",
        ARCHIVES,
        f"--from minimind --source {{f}}/x.pth {BASE} --lora_name y",
    ),
    "--from peft, .bin": (
        convert_model.main,
        "bin/adapter_model.bin",
        ARCHIVES,
        f"--from peft --source {{f}}/bin {BASE} --lora_name y",
    ),
}
PEFT = f"--from peft --source {{f}}/adapter {BASE} --lora_name y"
DOORS |= {
    "--from peft": (convert_model.main, "adapter/adapter_model.safetensors", HEADERS, PEFT),
    "--from peft, settings": (convert_model.main, "adapter/adapter_config.json", SETTINGS, PEFT),
}
LLAMA = "--from huggingface --source {f}/llama --output {f}/new/x.pth"
DOORS |= {
    "--from huggingface": (convert_model.main, "llama/model.safetensors", HEADERS, LLAMA),
    "--from huggingface, config": (convert_model.main, "llama/config.json", CONFIGS, LLAMA),
}


@dataclass
class Options(CheckedOptions):
    """Print what each door says of each file, and the most that a refusal took."""

    result: Path | None = option(
        REPOSITORY / "benchmarks/results/strangers.json", "file of the figures"
    )


def main(argv: list[str] | None = None) -> None:
    options = parse(Options, argv)
    heard, cells, wrong = [], {}, []
    sys.addaudithook(lambda event, _: heard.append(event) if event in EVENTS else None)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        good = good_files(Path(folder) / "good")
        for door, (_, _, files, _) in DOORS.items():
            for file, (_, reason) in files.items():
                canary = prepare(door, file, good, Path(folder) / "at")
                heard.clear()
                cell = measured(door, Path(folder) / "at")
                ran = canary.exists() or heard
                dear = cell["seconds"] > SECONDS or cell.get("megabytes", 0) > MEGABYTES
                if ran or dear or reason not in cell["said"]:
                    wrong.append(f"{file} through {door}")
                cells[f"{door}: {file}"] = cell
                print(f"{door}: {file}: {cell}", flush=True)
    most = {key: max(cell.get(key, 0) for cell in cells.values()) for key in ("seconds", MEMORY)}
    print(f"{len(cells)} files through {len(DOORS)} doors, at most {most}")
    figures = {"most": most, "wrong": wrong, "cells": cells}
    write_results(options.result, figures | measured_on(("torch", "safetensors", "transformers")))
    if wrong:
        sys.exit(f"not refused as it should be: {', '.join(wrong)}")


def good_files(folder: Path) -> Path:
    """A base, a skill, and both for other tools, in ``folder``."""
    base, skill = folder / "full_sft_64.pth", lora_path(folder, "a", SHAPE["dim"])
    model, _ = seeded_model(SHAPE)
    known = tokenizer_fingerprint(load_tokenizer(TOKENIZER_DIR))
    save_base(base, model, RunRecord(stage="full_sft", tokenizer=known))
    add_seeded_lora(model, 4)
    save_lora(model, skill, SkillMeta(stage="lora"))
    for to, name, flags in (("huggingface", "llama", {}), ("peft", "adapter", {"lora_name": "a"})):
        where = {"base": base, "out_dir": folder, "output": folder / name}
        convert_model.main(flag_words({"to": to} | where | flags))
    shutil.copytree(folder / "adapter", folder / "bin")
    (folder / "bin" / "adapter_model.safetensors").unlink()
    return folder


def prepare(door: str, file: str, good: Path, at: Path) -> Path:
    """Put copies of the good files into ``at``, and the hostile one where the door looks for it.

    Returns the canary: a path where the code in the file, if run, leaves a file.
    """
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(good, at)
    _, place, files, _ = DOORS[door]
    canary = at / "canary"
    files[file][0](at / place, canary)
    return canary


def refused(door: str, at: Path) -> str:
    """What the door says of the file in ``at``; empty if it takes it."""
    main, _, _, flags = DOORS[door]
    try:
        with redirect_stdout(io.StringIO()):
            main([word.format(f=at, chats=CHATS) for word in flags.split()])
    except UserError as error:
        return str(error)
    return ""


def measured(door: str, at: Path) -> dict:
    """What the door says, its seconds, and on Linux the memory it needed beside what it had."""
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")  # sets the highest to what it is now
    before, begun = highest(), time.perf_counter()
    said = refused(door, at)
    seconds = round(time.perf_counter() - begun, 3)
    found = {} if before is None else {MEMORY: round(highest() - before, 1)}
    return {"seconds": seconds, **found, "said": said.replace(f"{at}{os.sep}", "")}


def highest() -> float | None:
    """The most megabytes that this process has had; None where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) / 1000 for x in lines if x.startswith("VmHWM")), None)


if __name__ == "__main__":
    run(main)
