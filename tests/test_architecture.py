"""The plan of the house: who imports whom, how long a file is, what product code never does."""

import ast
import pkgutil
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"core", "model", "dataset", "trainer", "interop", "serving"}
# room -> the rooms and packages that it may import, beside itself and the standard library
ALLOWED = {
    "core": set(),
    "model": {"core", "torch", "transformers", "bitsandbytes"},
    "dataset": {"core", "torch", "datasets", "pyarrow", "tokenizers", "transformers", "numpy"},
    "trainer": {"core", "model", "dataset", "transformers"},
    "interop": {"core", "model", "torch", "transformers", "safetensors", "numpy", "gguf"},
    "serving": {"core", "model", "dataset.chat", "dataset.tokenizer"},
}
ALLOWED["dataset"] |= {"tqdm", "jinja2"}
ALLOWED["trainer"] |= {"torch", "safetensors", "wandb", "tqdm", "matplotlib", "bitsandbytes"}
ALLOWED["serving"] |= {"tokenizers", "transformers", "torch", "fastapi", "uvicorn", "pydantic"}
FOLDERS = sorted(ROOMS | {"scripts", "benchmarks"})
PRODUCT = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
DOORS = sorted(ROOT.glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imported_modules(tree):
    """Dotted names of all imports, inside functions too; ``from a import b`` is ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their room: no relative ones"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_imports(room, source):
    """The modules that a file of ``room`` imports but may not, sorted."""
    allowed = ALLOWED[room] | {room} | set(sys.stdlib_module_names)
    found = imported_modules(ast.parse(source))
    return sorted(
        name for name in found if not any(f"{name}.".startswith(f"{a}.") for a in allowed)
    )


def forbidden_calls(source, may_load=False):
    """Where a source runs text or pickles, starts a shell, trusts code or loads more than data."""
    found = []
    tree = ast.parse(source)
    for module in imported_modules(tree):
        room = module.partition(".")[0]
        if room in {"pickle", "dill", "joblib", "shelve"} or module == "torch.load":
            found.append(f"import of {module}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in {"eval", "exec", "os.system", "os.popen"}:
            found.append(f"line {node.lineno}: {name}")
        for flag in ("shell", "trust_remote_code", "allow_pickle"):
            if settings.get(flag, "False") != "False":
                found.append(f"line {node.lineno}: {flag}")
        if name == "torch.load" and not (may_load and settings.get("weights_only") == "True"):
            found.append(f"line {node.lineno}: torch.load")
    return found


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_every_import_follows_the_plan(room):
    for path in (ROOT / room).rglob("*.py"):
        assert forbidden_imports(room, path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("model", "from trainer.loop import train", ["trainer.loop.train"]),
        ("model", "def f():\n    import dataset.chat", ["dataset.chat"]),
        ("trainer", "from scripts import wiring", ["scripts.wiring"]),
        ("dataset", "from trainer import loop as core", ["trainer.loop"]),
        ("core", "import torch.nn as nn\nimport os", ["torch.nn"]),
        ("core", "import modelling", ["modelling"]),
        ("serving", "from dataset.sft import SFTDataset", ["dataset.sft.SFTDataset"]),
        ("serving", "from dataset.chat import encode_chat\nfrom model import weights", []),
    ],
)
def test_a_forbidden_import_is_found(room, source, found):
    assert forbidden_imports(room, source) == found


def test_product_code_never_does_what_is_forbidden():
    assert len(PRODUCT) > 10 and len(DOORS) >= 4
    for path in [*PRODUCT, *DOORS]:
        may_load = path == ROOT / "model" / "weights.py"
        assert forbidden_calls(path.read_text(encoding="utf-8"), may_load) == [], path


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
        "os.system(line)",
    ],
)
def test_a_forbidden_call_is_found(source):
    assert forbidden_calls(source, may_load=True)


def test_weights_only_loading_is_left_to_one_file():
    line = "torch.load(path, weights_only=True)"
    assert forbidden_calls(line, may_load=True) == []
    assert forbidden_calls(line) == ["line 1: torch.load"]
    assert forbidden_calls("model.eval()\nlist_a.load(f)") == []


def exists(name):
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


def test_every_import_of_ours_is_there():
    """Also those inside functions, which nothing meets before the function runs."""
    ours = {path.stem for path in DOORS} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    found = {
        name: path
        for path in [*PRODUCT, *DOORS, *TESTS]
        if path.name != "minimind_child.py"  # its rooms are MiniMind's, which have the same names
        for name in imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        if name.partition(".")[0] in ours
    }
    assert {"model.weights.choose_base", "scripts.exam.examine"} <= found.keys()
    assert {name: path for name, path in found.items() if not exists(name)} == {}
    assert not exists("model.weights.no_such_name")


def definitions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.name}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_files_and_functions_stay_short_enough_to_read():
    limits = dict.fromkeys(PRODUCT, 400) | dict.fromkeys(DOORS, 100) | dict.fromkeys(TESTS, 600)
    limits[ROOT / "eval_model.py"] = 150
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in limits}
    assert {str(path): length for path, length in lengths.items() if length > limits[path]} == {}
    long = {name: n for path in [*PRODUCT, *DOORS] for name, n in definitions(path) if n > 50}
    assert long == {}


def command_line_words(source):
    """The texts of a source that name a flag or a script, docstrings included."""
    nodes = ast.walk(ast.parse(source))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant))
    words = re.compile(r"--[a-z]|scripts/|train_\w+\.py")
    return [text for text in texts if isinstance(text, str) and words.search(text)]


@pytest.mark.parametrize("room", ["model", "dataset", "trainer", "serving", "interop"])
def test_libraries_do_not_speak_command_line(room):
    for path in (ROOT / room).rglob("*.py"):
        assert command_line_words(path.read_text(encoding="utf-8")) == [], path
    assert command_line_words('raise UserError("pass --bad_rows skip")')
    assert command_line_words('"look at it with scripts/inspect_data.py"')


def test_no_file_is_a_drawer_for_everything():
    names = {path.name for path in [*PRODUCT, *DOORS, *TESTS]}
    drawer = re.compile(r"(.*_)?(utils?|helpers?|misc|common)\.py")
    assert [name for name in names if drawer.fullmatch(name)] == []
