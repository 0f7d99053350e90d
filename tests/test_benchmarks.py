"""What the benchmarks compute of the figures that they measure or count."""

import copy
import io
import json
import sys
from contextlib import redirect_stdout

import pytest
import torch
from conftest import logits_of, ragged_batch

import train_full_sft
import train_lora
import train_pretrain
from benchmarks import compare, identity, keeping, lora_life, size_report, starts
from benchmarks.result_file import read_results
from core.errors import UserError
from core.options import parse
from core.paths import REPOSITORY, base_path, lora_path
from model.lora.layer import adapted
from model.model_lora import apply_lora
from scripts.quickstart_stages import flag_words
from trainer.loop import causal_loss_sum

DOORS = {"train_pretrain.py": train_pretrain, "train_full_sft.py": train_full_sft}
DOORS |= {"train_lora.py": train_lora}


@pytest.mark.parametrize("words", [[], ["--other", "{folder}"]])
def test_a_comparison_needs_a_checkout(tmp_path, words):
    with pytest.raises(UserError, match="--other"):
        compare.main([word.format(folder=tmp_path) for word in words])


def test_the_doors_know_the_flags_of_a_comparison():
    for command in (*compare.PREPARED, *(command for _, command in compare.TIMED.values())):
        script, *flags = compare.words(f"{command} {compare.COMMON}")
        options = parse(DOORS[script].Options, flags)
        assert all(path.exists() for path in options.data_path)


def test_a_ratio_is_the_median_over_the_rounds():
    this = {"step": [1.0, 2.0, 4.0], "swap": [1.0, 1.0, 1.0]}
    other = {"step": [2.0, 2.0, 2.0], "swap": [1.0, 3.0, 2.0]}
    assert compare.ratios(this, other) == {"step": 1.0, "swap": 2.0}


def test_seconds_are_those_after_the_first_step(trained):
    path = trained.out / "metrics" / "lora_a_64.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "seconds" in record]
    assert [record["step"] for record in steps] == [1, 4]
    assert compare.seconds_in(path) == pytest.approx(steps[1]["seconds"] - steps[0]["seconds"])


def test_swaps_are_timed_by_published_calls(trained, monkeypatch):
    files = [base_path(trained.out, "full_sft", 64)]
    files += [lora_path(trained.out, name, 64) for name in "ab"]
    monkeypatch.setattr(sys, "argv", ["-c", "4", *map(str, files)])
    said = io.StringIO()
    with redirect_stdout(said):
        exec(compare.SWAP.replace("dim=256, n_layers=6", "dim=64, n_layers=2, n_heads=4"), {})
    assert json.loads(said.getvalue()) > 0


SOURCE = '''def one():
    """Says
    two lines.
    """


class A:
    async def two(self):
{body}        return 1
'''


def test_a_report_counts_what_it_says(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / ".venv").mkdir()
    source = SOURCE.format(body="        x = 1\n" * 49)
    (tmp_path / "model" / "a.py").write_text(source, encoding="utf-8")
    (tmp_path / "tests" / "b.py").write_text(f"x = '{'y' * 100}'\n", encoding="utf-8")
    (tmp_path / ".venv" / "c.py").write_text("not counted", encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text("# A\n\n1. `no.py`\n", encoding="utf-8")
    found = size_report.main(["--root", str(tmp_path)])
    assert (found["product_lines"], found["test_lines"]) == (58, 1)
    assert found["docstring_lines_a_function"] == 1.5
    assert found["functions_over_50_lines"] == found["lines_over_100_columns"] == 1
    assert found["longest_function"] == {"model/a.py:8 two": 51}
    assert found["reading_path"] is None
    listed = "1. `model/a.py`: all of\n   `A`\n\n"
    text = f"# A\n\n### The Reading path\n\n{listed}## Next\n\n1. `no.py`\n"
    readme.write_text(text, encoding="utf-8")
    path = size_report.main(["--root", str(tmp_path)])["reading_path"]
    assert path == {"files": 1, "lines": 58, "first_lines": 52, "in_order": {"model/a.py": 58}}


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


def test_random_swaps_leave_the_default_model_as_it_was():
    unchanged = {"sha256_unchanged": True, "logits_bit_equal": True}
    assert lora_life.random_swaps(20) == {"swaps": 20, **unchanged}


def inputs_of(model, name, batches):
    """What the Linear of this name is given."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0])
    )
    with torch.no_grad():
        for batch in batches:
            causal_loss_sum(model, batch)
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in found])


@pytest.mark.parametrize("kind", ["gradient", "eva"])
def test_a_start_spans_its_steepest_or_its_largest_directions(sharp_model, kind):
    model, twin = sharp_model.double(), copy.deepcopy(sharp_model)
    base = logits_of(model)
    for part in (model, twin):
        for block in part.layers:
            block.feed_forward.dropout.p = 0.3  # which the start does not draw
    batches = [ragged_batch(3, seed=seed) for seed in (1, 2)]
    for batch in batches:
        causal_loss_sum(twin.eval(), batch).backward()
    apply_lora(model.train(), 4, target_modules=["wq", "w2"])
    starts.STARTS[kind](model.double(), batches)
    assert model.training and all(p.grad is None for p in model.parameters())
    for name, linear in adapted(model):
        A = linear.lora.A.weight.detach()
        gradient = twin.get_submodule(name).weight.grad
        of = gradient if kind == "gradient" else inputs_of(twin, name, batches)
        _, sizes, V = torch.linalg.svd(of, full_matrices=False)
        assert sizes[3] > 1.0001 * sizes[4], "the directions can be told apart"
        length = 0.02 * A.size(1) ** 0.5
        torch.testing.assert_close(A.T @ A, length**2 * V[:4].T @ V[:4], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(A @ A.T, length**2 * torch.eye(4).double(), rtol=1e-4, atol=1e-6)
    assert torch.equal(logits_of(model.eval()), base), "B is 0"


def test_ranks_by_importance_share_out_as_many_as_equal_ones(trained, tmp_path):
    base = base_path(trained.out, "full_sft", 64)
    options = starts.Options(base=base, data_path=(trained.chats,), out_dir=tmp_path)
    pattern = dict(word.split("=") for word in starts.ranks_by_importance(options))
    ranks = sorted(map(int, pattern.values()))
    assert len(ranks) == 4 and sum(ranks) == 4 * 16
    assert ranks[0] >= 1 and ranks[-1] > 16, "they differ"


def test_a_flag_that_is_false_is_turned_off():
    flags = {"keep": 0, "keep_best": False, "data_path": ("a", "b")}
    assert flag_words(flags) == ["--keep", "0", "--no-keep_best", "--data_path", "a", "b"]


@pytest.mark.parametrize("page", ["keeping.md", "keeping_zh.md"])
def test_the_page_on_keeping_has_the_rows_of_the_result_file(page):
    found = read_results(REPOSITORY / "benchmarks" / "results" / "keeping.json")["found"]
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    assert set(keeping.ARMS) == set(found)
    for arm in found:
        _, row = keeping.table_row(arm, found).split(f"| {arm} |")
        assert row.replace("%", " %") in text


def test_a_damaged_result_file_is_refused_and_a_missing_one_is_empty(tmp_path):
    path = tmp_path / "figures.json"
    assert read_results(path) == read_results(None) == {}
    path.write_text('{"found": {', encoding="utf-8")
    with pytest.raises(UserError, match="figures"):
        read_results(path)
