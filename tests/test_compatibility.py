"""The table of tools says what the conversions do: what it promises is written, no more."""

import json
import shlex

import pytest
from conftest import flags, strengthen

from core.errors import UserError
from core.paths import lora_path
from interop.compatibility import ADAPTER, FILE, MERGED, REFUSED, WORKS, WRONG
from model.lora.skill_file import save_lora
from model.model_lora import apply_lora
from model.weights import load_base
from scripts import compatibility, convert_model

BASE = "full_sft_64.pth"
KINDS = {
    "square": {"rank": 16},
    "scaled": {"rank": 4, "alpha": 8},
    "all": {"rank": 4, "target_modules": "all-linear"},
    "dora": {"rank": 16, "use_dora": True},
}
# For each kind: who refuses an adapter, and what MiniMind makes of the file itself.
EXPECTED = {
    "square": (set(), WORKS),
    "scaled": (set(), WRONG),
    "all": ({"MiniMind"}, WRONG),
    "dora": ({"vLLM", "llama.cpp", "Ollama", "MiniMind"}, WRONG),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_says_is_what_the_conversions_do(trained, tmp_path, kind):
    model, _ = load_base(trained.out / BASE)
    apply_lora(model, **KINDS[kind])
    strengthen(model, 5)
    path = lora_path(tmp_path, kind, 64)
    path.parent.mkdir()
    save_lora(model, path)
    base, report = trained.out / BASE, tmp_path / "report.json"
    argv = flags(lora_name=kind, out_dir=tmp_path, base=base, output=report)
    found = compatibility.main(argv)
    rows = json.loads(report.read_text(encoding="utf-8"))["verdicts"]
    assert rows == found
    refused, own = EXPECTED[kind]
    adapters = {row["tool"] for row in found if (row["form"], row["verdict"]) == (ADAPTER, REFUSED)}
    assert adapters == refused | {"mlx-lm"}
    assert [row["verdict"] for row in found if row["form"] == FILE] == [own]
    for number, text in enumerate(dict.fromkeys(row["command"] for row in found)):
        if text:
            words = shlex.split(text)[1:-2]
            ending = {"gguf": ".gguf", "minimind": ".pth"}.get(words[1], "")
            output = tmp_path / f"written{number}{ending}"
            convert_model.main([*words, *flags(out_dir=tmp_path, base=base, output=output)])
            assert output.exists()
    formats = {"PEFT": "peft", "llama.cpp": "gguf", "MiniMind": "minimind"}
    for tool in refused & formats.keys():
        ending = {"gguf": ".gguf", "minimind": ".pth"}.get(formats[tool], "")
        more = {"output": tmp_path / f"refused{ending}", "base": base, "out_dir": tmp_path}
        with pytest.raises(UserError):
            convert_model.main(flags(to=formats[tool], lora_name=kind, **more))
        assert not more["output"].exists()
    assert all(row["verdict"] != REFUSED for row in found if row["form"] == MERGED)
    with pytest.raises(UserError, match="exists"):
        compatibility.main(argv)
