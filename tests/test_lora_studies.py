"""Answers that count as hits, and what a skill costs beside its base."""

import json

from benchmarks import identity, lora_life


def test_a_hit_names_the_new_name_and_not_the_former():
    assert identity.is_hit("I am Lumi.") and identity.is_hit("I was built by the MiniMind project.")
    for wrong in (
        "I am an assistant.",
        "I am Lumi, once SmolLM.",
        "Lumi was trained by Hugging Face.",
    ):
        assert not identity.is_hit(wrong)
    assert len(set(identity.PARAPHRASES.read_text().splitlines())) >= 40


def test_the_english_rows_get_their_names(tmp_path):
    rows = [
        {"instruction": "Who?", "input": "", "output": "I am {{name}} by {{author}}."},
        {"instruction": "谁?", "input": "", "output": "{{name}}"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert identity.write_english(tmp_path / "rows.json", tmp_path / "rows.jsonl") == 1
    assert "I am Lumi by the MiniMind project." in (tmp_path / "rows.jsonl").read_text()


def test_an_update_costs_two_thin_matrices_and_merges_exactly():
    row = lora_life.one_linear(512, 16)
    assert (row["trained"], row["full"], row["percent"]) == (2 * 512 * 16, 512 * 512, 6.25)
    assert row["merged_error_float32"] < 1e-5 < row["merged_error_bfloat16"] < 0.01
    assert row["undone_float32"] and row["undone_bfloat16"]


def test_a_thousand_swaps_leave_the_default_model_as_it_was(monkeypatch):
    monkeypatch.setattr(lora_life, "SWAPS", 20)
    assert lora_life.thousand_swaps() == {
        "swaps": 20,
        "sha256_unchanged": True,
        "logits_bit_equal": True,
    }
