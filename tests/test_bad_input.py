"""Doors x mistakes: exit code 2, exactly one line on stderr, and every result file as it was."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Trained

import eval_model
import train_dpo
import train_full_sft
import train_lora
import train_pretrain
from core.errors import run
from core.options import GROUPS
from core.paths import REPOSITORY, TOKENIZER_DIR
from scripts import inspect_data, train_tokenizer

DOORS = {
    "pretrain": train_pretrain,
    "sft": train_full_sft,
    "lora": train_lora,
    "dpo": train_dpo,
    "chat": eval_model,
    "tokenizer": train_tokenizer,
    "inspect": inspect_data,
}
TRAINING, CHATS, BASED = ("pretrain", "sft", "lora"), ("sft", "lora"), ("sft", "lora", "chat")
OUR_BASE = ("pretrain", "sft")
SKILL = "--skill {f}/out/lora/lora_a_64.pth --lora_name x"


def long_question(n: int) -> str:
    """A chat whose question is longer than --max_seq_len, so no answer is left after the cut."""
    user = {"role": "user", "content": f"{n} " * 300}
    return json.dumps({"messages": [user, {"role": "assistant", "content": "x"}]})


def pair(n: int) -> str:
    return json.dumps({"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."})


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory) -> Trained:
    """A copy of the trained folder beside which lie all kinds of broken files."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(trained.out, folder / "out")
    good = (folder / "out" / "full_sft_64.pth").read_bytes()
    skill = folder / "out" / "lora" / "lora_a_64.pth"
    chats = trained.chats.read_text(encoding="utf-8").splitlines()
    files = {
        "empty.jsonl": "",
        "broken.jsonl": "\n".join([chats[0], '{"conversations": [', chats[1]]),
        "roles.jsonl": json.dumps({"conversations": [{"role": "robot", "content": "x"}]}),
        "texts_for_chats.jsonl": '{"text": "a"}\n{"text": "b"}\n',
        "wrong_ending.docx": "a,b\n",
        "long_questions.jsonl": "\n".join(map(long_question, range(4))),
        "one_row.jsonl": chats[0],
        "pairs.jsonl": "\n".join(map(pair, range(8))),
        "equal.jsonl": json.dumps({"prompt": "Q", "chosen": "A", "rejected": "A"}),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "chats.jsonl").write_text("\n".join(chats), encoding="utf-8")
    shutil.copytree(TOKENIZER_DIR, folder / "other")
    (folder / "latin1.jsonl").write_bytes('{"text": "caf\u00e9"}'.encode("latin-1"))
    (folder / "truncated.pth").write_bytes(good[: len(good) // 2])
    (folder / "flipped.pth").write_bytes(good[:20000] + bytes([good[20000] ^ 1]) + good[20001:])
    (folder / "noise.pth").write_bytes(b"this is no archive")
    torch.save({"layers.0.attention.wq.weight": torch.ones(2, 2)}, folder / "not_a_model.pth")
    tensors = torch.load(folder / "out" / "full_sft_64.pth", weights_only=True)
    torch.save({**tensors, "norm.weight": tensors["norm.weight"] * torch.nan}, folder / "nan.pth")
    torch.save(tensors, folder / "bare.pth")  # MiniMind's: no .json beside it
    lora = folder / "out" / "lora"
    (lora / "lora_truncated_64.pth").write_bytes(skill.read_bytes()[:3000])
    torch.save(tensors, lora / "lora_whole_64.pth")
    (lora / "lora_wide_128.pth").write_bytes(skill.read_bytes())
    parts = torch.load(skill, weights_only=True)
    for name, text in (("deep", "[" * 100_000), ("huge", '{"alpha": 1' + "0" * 400 + "}")):
        parts["_meta"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        torch.save(parts, lora / f"lora_{name}_64.pth")
    pretrained = torch.load(folder / "out" / "pretrain_64.pth", weights_only=True)
    torch.save(pretrained, folder / "out" / "other_64.pth")
    record = json.loads((folder / "out" / "pretrain_64.json").read_text(encoding="utf-8"))
    (folder / "out" / "other_64.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "mismatch.pth").write_bytes(good)
    (folder / "mismatch.json").write_text(json.dumps(record), encoding="utf-8")
    return replace(trained, out=folder / "out")


# (doors, flags, what the one line must say); {f} is the folder with the broken files
CASES = [
    (TRAINING, "--data_path {f}/nothing.jsonl", "nothing.jsonl does not exist"),
    (("inspect",), "{f}/nothing.jsonl", "nothing.jsonl does not exist"),
    (("tokenizer",), "--data_path {f}/nothing.jsonl", "nothing.jsonl does not exist"),
    (TRAINING, "--data_path {f}/wrong_ending.docx", "unknown ending"),
    (TRAINING, "--data_path {f}/empty.jsonl", "no usable row"),
    (CHATS, "--data_path {f}/broken.jsonl", "broken.jsonl:2: invalid JSON"),
    (CHATS, "--data_path {f}/roles.jsonl", "roles.jsonl:1: message 1 has"),
    (CHATS, "--data_path {f}/texts_for_chats.jsonl", "2 bad rows"),
    (("pretrain",), "--data_path {f}/roles.jsonl", 'no "text"'),
    (("pretrain",), "--data_path {f}/latin1.jsonl", "not UTF-8"),
    (CHATS, "--data_path {f}/long_questions.jsonl", "nothing is left to learn"),
    (CHATS, "--data_path {f}/one_row.jsonl", "no row to train on"),
    (BASED, "--base {f}/nothing.pth", "nothing.pth does not exist"),
    (BASED, "--base {f}/truncated.pth", "truncated.pth is not a readable"),
    (BASED, "--base {f}/flipped.pth", "flipped.pth is damaged"),
    (BASED, "--base {f}/noise.pth", "noise.pth is not a readable"),
    (BASED, "--base {f}/not_a_model.pth", "is no MiniMindLM"),
    (BASED, "--base {f}/nan.pth", "NaN or infinity in norm.weight"),
    (BASED, "--base {f}/bare.pth", "name its tokenizer_path"),
    (BASED, "--base {f}/mismatch.pth", "not from the same run"),
    (OUR_BASE, "--base owner/model", "owner/model is no MiniMindLM"),
    (TRAINING, "--base {f}/out/lora/lora_a_64.pth", "lora_a_64.pth is a skill"),
    (("pretrain",), "--base {f}/truncated.pth", "truncated.pth is not a readable"),
    (("pretrain",), "--base {f}/bare.pth", "name its tokenizer_path"),
    (("pretrain",), "--base {f}/out/pretrain_64.pth", "choose another out_dir"),
    (
        ("pretrain",),
        "--base {f}/out/pretrain_64.pth --dim 512 --n_layers 2 --n_heads 8 --dropout 0.1",
        "--dim 512 (it has 64), --n_heads 8 (it has 4), --dropout 0.1 (it has 0.0)",
    ),
    (("lora",), "--skill {f}/nothing.pth", "nothing.pth does not exist"),
    (("lora",), "--skill {f}/out/full_sft_64.pth", "full_sft_64.pth is no LoRA file"),
    (("lora",), "--skill {f}/out/lora/lora_a_64.pth --lora_name a", "lora_a_64.pth is what"),
    (("lora",), f"{SKILL} --rank 16 --use_dora", "lora_a_64.pth has its rank and targets"),
    (("lora",), f"{SKILL} --base {{f}}/out/pretrain_64.pth", "was trained on full_sft_64.pth"),
    (("lora",), f"{SKILL} --base {{f}}/out/pretrain_64.pth", "/out/pretrain_64.pth"),
    (("lora",), f"{SKILL} --load_in_4bit", "load_in_4bit False, not True"),
    (("lora",), f"{SKILL} --prompt_template Q{{user}}", "prompt_template None, not 'Q{user}'"),
    ((*TRAINING, "chat"), "--out_dir=", "--out_dir: "),
    (TRAINING, "--tokenizer_path=", "--tokenizer_path: "),
    (TRAINING, "--device cpu:3", "device cpu:3: "),
    (BASED, "--out_dir {f}/nowhere", "no base model"),
    (
        ("chat",),
        "--lora_name a --base {f}/out/pretrain_64.pth --prompt x",
        "was trained on full_sft_64.pth",
    ),
    (("chat",), "--lora_name nobody --prompt x", "there is no skill file"),
    (("chat",), "--lora_name wide --prompt x", "name its base"),
    (("chat",), "--lora_name truncated --prompt x", "lora_truncated_64.pth is not a readable"),
    (("chat",), "--lora_name whole --prompt x", "is no LoRA file"),
    (("lora", "chat"), "--lora_name ../escape", "is not a skill name"),
    (("lora", "chat"), "--lora_name a/b", "is not a skill name"),
    (("lora", "chat"), f"--lora_name {'x' * 300}", "is not a skill name"),
    (("lora", "chat"), "--lora_name off", "is not a skill name"),
    (("chat",), "--lora_name deep --prompt x", "is no LoRA file"),
    (("chat",), "--lora_name huge --prompt x", "is no LoRA file"),
    (("dpo",), "--data_path {f}/equal.jsonl", "equal.jsonl:1: chosen and rejected are the same"),
    (("dpo",), "--data_path {f}/chats.jsonl", "chats.jsonl:1: "),
    (("dpo",), "--data_path {f}/empty.jsonl", "no usable row"),
    (("dpo",), "--beta 0", "beta=0.0 must be above 0"),
    (("dpo",), "--learning_rate 0", "learning_rate=0.0 must be above 0"),
    (("dpo",), "--rank 8 --skill x.pth", "only a skill has rank, skill"),
    (("dpo",), "--lora_name x --lora_dropout 0.1", "here dropout is 0.1"),
    (("dpo",), "--lora_name a/b", "is not a skill name"),
    (("dpo",), "--base {f}/out/lora/lora_a_64.pth", "lora_a_64.pth is a skill"),
    (("dpo",), "--max_seq_len 4", "nothing is left to learn"),
    (("lora",), "--rank 0", "rank=0 must be at least 1"),
    (("lora",), "--rank 99999999999", "exceeds the 64 features"),
    (("lora",), "--lora_dropout 1", "lora_dropout=1.0 must be"),
    (("lora",), "--loraplus_lr_ratio nan", "loraplus_lr_ratio=nan must be"),
    (("lora",), "--target_modules wq w9", "'w9' matches nothing; there are w1,"),
    (("lora",), "--target_modules (", "'(' is no regular expression"),
    (("lora",), "--rank_pattern wq", "rank_pattern 'wq' must be NAME=NUMBER"),
    (("lora",), "--layers_to_transform 7", "[7] match no target; there are layers 0, 1"),
    (("lora",), "--init_lora_weights zero", "invalid choice"),
    (("lora",), "--prompt_template Q", "leave out prompt_template"),
    (("chat",), "--prompt_template Q --prompt x", "leave out prompt_template"),
    (("lora",), "--alpha -1", "alpha=-1.0 must be"),
    (("lora",), "--alpha inf", "alpha=inf must be"),
    (TRAINING, "--warmup_iters 4", "must be shorter than the run of 4"),
    (("lora",), "--max_steps -1", "max_steps=-1 must be"),
    (("lora",), "--seed 99999999999999999999", "seed=99999999999999999999 must be"),
    (("chat",), "--seed 99999999999999999999", "seed"),
    (("pretrain",), "--dim 10000000000", "dim=10000000000 must be"),
    (TRAINING, "--epochs 0", "epochs=0 must be at least 1"),
    (("lora",), "--epochs 999999999999999999999", "epochs=999999999999999999999 must be"),
    (("lora",), "--num_workers 2000", "num_workers=2000 must be"),
    (("lora",), "--batch_size many", "'many' is not a whole number"),
    (TRAINING, "--learning_rate nan", "learning_rate=nan"),
    (TRAINING, "--val_ratio 1", "val_ratio=1.0"),
    (TRAINING, "--keep_best --patience 2 --val_ratio 0", "patience needs held-out rows"),
    (TRAINING, "--no-keep_best --patience 2", "patience waits for a better validation"),
    (TRAINING, "--patience -1", "patience=-1 must be"),
    (("lora",), "--keep -1", "keep=-1.0 must be"),
    (("lora",), "--keep inf", "keep=inf must be"),
    (("lora",), "--keep_rows 0", "keep_rows=0 must be"),
    (("lora",), "--keep 0 --keep_questions {f}/chats.jsonl", "keep_questions hold nothing"),
    (("lora",), "--keep_questions {f}/empty.jsonl", "empty.jsonl"),
    (("lora",), "--general_data {f}/chats.jsonl", "train without them by keep=0"),
    (("lora",), "--general_data {f}/long_questions.jsonl", "train without them by keep=0"),
    (("lora",), "--general_data {f}/nothing.jsonl --keep 0", "nothing.jsonl does not exist"),
    (("lora",), "--max_seq_len 1", "max_seq_len=1 must be"),
    (TRAINING, "--max_seq_len 9000", "exceeds the model's context of 8192"),
    (TRAINING, "--device warp", "device 'warp'"),
    (TRAINING, "--device cuda:77", "device cuda:77"),
    (("lora",), "--dtype float64", "invalid choice"),
    (TRAINING, "--dtype float16 --device cpu", "float16 needs a GPU"),
    (("lora",), "--use_wandb yes", "unexpected argument 'yes'"),
    (TRAINING, "--tokenizer_path {f}", "no tokenizer.json"),
    (("pretrain",), "--dim 60 --n_heads 7", "must split into n_heads=7"),
    (("pretrain",), "--n_heads 8 --n_kv_heads 3", "must be a multiple of n_kv_heads=3"),
    (BASED, "--dim 512", "unknown flag --dim"),
    (tuple(DOORS), "--learning_rat 1", "unknown flag --learning_rat"),
    (tuple(DOORS), "--use_moe True", "--use_moe is gone"),
    (("lora",), "--ddp", "--ddp is gone"),
    (("chat",), "--model_mode 1", "--model_mode is gone"),
    (("chat",), "--temperature -1", "temperature"),
    (("chat",), "--temperature 1e-45", "temperature"),
    (("chat",), "--repetition_penalty 1e-45", "repetition_penalty"),
    (("chat",), "--top_p 0", "top_p"),
    (("chat",), "--history_cnt 3", "history_cnt"),
    (("tokenizer",), "--vocab_size 10", "vocab_size=10 must be at least 259"),
    (("tokenizer",), "--data_path {f}/empty.jsonl", "no usable row in {f}/empty.jsonl"),
    (
        ("tokenizer",),
        "--data_path {f}/chats.jsonl --tokenizer_path {f}/other --vocab_size 400",
        "another tokenizer",
    ),
    (
        ("tokenizer",),
        "--data_path {f}/chats.jsonl --tokenizer_path {f}/noise.pth --vocab_size 400",
        "cannot write",
    ),
]


EXPANDED = [
    pytest.param(door, flags, said, id=f"{door} {flags}")
    for doors, flags, said in CASES
    for door in doors
]


def results(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Every result file, and what changes when it is written; the cache is no result."""
    files = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
    found = {path: path.stat() for path in files}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.mark.parametrize(("door", "flags", "said"), EXPANDED)
def test_a_mistake_is_one_line_and_harms_nothing(door, flags, said, place, capsys):
    folder = place.out.parent
    argv = [word.replace("{f}", str(folder)) for word in flags.split()]
    if door in (*TRAINING, "dpo"):
        data = {"pretrain": place.texts, "dpo": folder / "pairs.jsonl"}.get(door, place.chats)
        argv += [] if "--data_path" in flags else ["--data_path", str(data)]
        for name, value in SMALL.items():
            argv += [] if f"--{name}" in flags else [f"--{name}", str(value)]
    if door not in ("tokenizer", "inspect"):
        argv += [] if "--out_dir" in flags else ["--out_dir", str(place.out)]
    if door == "chat" and "--prompt" not in flags:
        argv += ["--prompt", "hello"]
    before = results(folder)
    with pytest.raises(SystemExit) as stopped:
        run(lambda: DOORS[door].main(argv))
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert said.replace("{f}", str(folder)) in err
    assert results(folder) == before


def run_bare(door: str, argv: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """A door in a Python without any package, so that nothing heavy can be imported."""
    program = f"import runpy, sys; sys.path.insert(0, {str(REPOSITORY)!r});"
    program += f"sys.argv = {[door, *argv]!r}; runpy.run_path({str(REPOSITORY / door)!r}, "
    program += "run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, encoding="utf-8")


@pytest.mark.parametrize(
    "door", ["train_pretrain", "train_full_sft", "train_lora", "train_dpo", "eval_model"]
)
def test_without_packages_flags_are_answered_and_the_installation_is_named(door, tmp_path):
    found = run_bare(f"{door}.py", ["--help"], tmp_path)
    assert (found.returncode, found.stderr) == (0, "") and "--out_dir" in found.stdout
    found = run_bare(f"{door}.py", ["--nonsense"], tmp_path)
    assert (found.returncode, found.stderr) == (2, "error: unknown flag --nonsense; see --help\n")
    found = run_bare(f"{door}.py", [], tmp_path)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert "scripts/quickstart.py" in found.stderr


@pytest.mark.parametrize("door", [train_pretrain, train_full_sft, train_lora, train_dpo])
def test_help_lists_every_training_flag_under_its_heading_and_ten_first(door, capsys):
    with pytest.raises(SystemExit):
        door.main(["--help"])
    options, *groups = re.split(r"\n\n(?=[a-z ]+:\n)", capsys.readouterr().out)[1:]
    assert "--h" in options and options.count("  --") == 0
    headings = [group.partition(":")[0] for group in groups]
    assert headings == [name for name in GROUPS if name in headings] and len(headings) >= 5
    assert len(re.findall(r"^  --", groups[0], re.MULTILINE)) <= 10
