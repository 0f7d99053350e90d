"""The parts of the LoRA studies that need no hours: choosing rates, counting hits, pairing scores,
going on.
"""

import json
import math

import pytest
from conftest import write_rows

from benchmarks import glue, identity, lora_life, qlora, rank_study, studies
from core.errors import UserError
from core.options import parse
from scripts import train_lora_classifier


@pytest.mark.parametrize("lowest", range(len(rank_study.RATES)))
def test_the_best_rate_is_found_from_anywhere_without_trying_all(lowest):
    for start in range(len(rank_study.RATES)):
        tried = set()

        def loss(place, tried=tried):
            tried.add(place)
            return abs(place - lowest)

        assert rank_study.best_rate(loss, start) == lowest
        between = range(min(start, lowest) - 1, max(start, lowest) + 2)
        assert tried <= set(between), "nothing beyond the neighbours of the way there"


def test_a_study_without_base_or_data_names_what_is_missing(trained, tmp_path):
    base = next(iter(trained.out.glob("full_sft_*.pth")))
    for words, said in (
        (
            [str(tmp_path / "no.pth"), str(trained.chats)],
            "no.pth is no base of ours with its .json",
        ),
        ([str(base), str(tmp_path / "no.jsonl")], "no.jsonl does not exist"),
    ):
        for study in (qlora, rank_study):
            with pytest.raises(UserError, match=said):
                study.main(["--base", words[0], "--data", words[1]])


def test_the_rank_study_goes_on_where_it_stopped(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rank_study, "TARGETS", {"square": ("square",)})
    monkeypatch.setattr(rank_study, "RANKS", (4,))
    monkeypatch.setattr(rank_study, "RATES", rank_study.RATES[2:4])
    monkeypatch.setattr(rank_study, "FIRST_RATE", 0)
    base = next(iter(trained.out.glob("full_sft_*.pth")))
    argv = [
        "--base",
        str(base),
        "--data",
        str(trained.chats),
        "--max_steps",
        "2",
        "--out_dir",
        str(tmp_path),
    ]
    argv += ["--val_tokens", "512"]
    argv += ["--result", str(tmp_path / "study.json")]
    found = rank_study.main(argv)
    best = found["best"]["square 4"]
    assert best["parameters"] == 4 * 4 * (64 + 64)
    assert best["loss"] == min(run["loss"] for run in found["runs"].values()) < best["base_loss"]
    assert (tmp_path / "study.png").stat().st_size > 10_000
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 4 | 2,048 |")
    again = rank_study.main(argv)
    assert again["best"] == found["best"]
    assert "square 4 " not in capsys.readouterr().out, "nothing was trained again"
    with pytest.raises(UserError, match=r"was made with .*'max_steps': 2"):
        rank_study.main([*argv, "--max_steps", "3"])


def test_the_cost_of_4_bits_is_measured_on_a_real_base(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes", reason="pip install -r requirements-4bit.txt")
    monkeypatch.setattr(qlora, "SEEDS", (1,))
    base = next(iter(trained.out.glob("full_sft_*.pth")))
    argv = [
        "--base",
        str(base),
        "--data",
        str(trained.chats),
        "--max_steps",
        "2",
        "--out_dir",
        str(tmp_path),
    ]
    argv += ["--val_tokens", "512"]
    argv += ["--result", str(tmp_path / "qlora.json"), "--cost_rounds", "1"]
    found = qlora.main(argv)
    whole, small = found["runs"]["fp32 1"], found["runs"]["nf4 1"]
    assert (
        found["gaps"] == [small["loss"] - whole["loss"]]
        and whole["base_loss"] != small["base_loss"]
    )
    cost = found["cost"][base.name]
    assert 4 < cost["nf4"]["bits_per_parameter"] < cost["nf4"]["bits_of_the_whole_base"] < 32
    assert all(
        figures["trainable"] and figures["peak_memory_mb"][0] > 100 for figures in cost.values()
    )
    assert "NF4 - fp32: " in capsys.readouterr().out


def test_a_study_made_in_parts_names_each_machine_and_day(tmp_path, monkeypatch):
    for day in ("2026-01-01", "2026-01-01", "2026-01-02"):
        monkeypatch.setattr(studies, "measured_on", lambda packages, day=day: {"date": day})
        runs = studies.Runs(tmp_path / "study.json", {"steps": 1}, ())
        assert runs.get("one", lambda day=day: {"day": day}) == {"day": "2026-01-01"}, "made once"
        runs.get(day, dict)
    assert runs.found["measured_on"] == [{"date": "2026-01-01"}, {"date": "2026-01-02"}]


def test_a_failed_run_ends_the_study_with_its_words_and_starts_no_more():
    begun = []

    def work(n):
        begun.append(n)
        return studies.said_by("train_lora.py", ["--rank", "0"], "the first run")

    with pytest.raises(UserError, match=r"the first run failed: error: .*rank"):
        studies.at_once(1, work, range(50))
    assert len(begun) < 5


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


def test_scores_count_and_pair_as_they_should():
    figures = {"accuracy": 0.8, "f1": 0.9, "mcc": 0.4}
    shares = {"cola": 40.0, "mrpc": 85.0, "rte": 80.0}
    assert {task: glue.points(figures | {"task": task}) for task in glue.TASKS} == pytest.approx(
        shares
    )
    ours, theirs = (
        [[11.0, 2.0, 6.0], [4.0] * 3, [1.0] * 3],
        [[10.0, 3.0, 6.0], [4.0] * 3, [0.0] * 3],
    )
    found = glue.difference(ours, theirs)
    assert found["by_task"] == pytest.approx([0, 0, 1]) and found["mean"] == pytest.approx(1 / 3)
    assert found["plus_minus"] == pytest.approx(2.447 * (1 / 3 / 9) ** 0.5), (
        "one task's seeds have variance 1"
    )


def test_the_best_of_the_tuning_is_scored_on_the_dev_rows(tmp_path, monkeypatch, capsys):
    """Only the runs themselves are left out: what they would score is a function of the run."""
    for task in glue.TASKS:
        for part in ("train", "dev"):
            write_rows(tmp_path / f"{task}_{part}.jsonl", [{"text": "a", "label": 1}])
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    ran, best = [], {"full": 8.7e-5, "lora": 8.7e-4, "qlora": 8.7e-4}

    def run(one, options):
        ran.append(one)
        off = abs(
            math.log(one.learning_rate / best[one.method])
        )  # best between two rates of the grid
        share = 0.8 - 0.1 * off + 0.01 * one.seed * (one.method == "lora")
        return {"accuracy": share, "f1": share, "mcc": share, "minutes": 1.0}

    cost = {"tokens_per_second": [1], "peak_memory_mb": [1], "trainable": 1}
    monkeypatch.setattr(glue, "train", run)
    monkeypatch.setattr(
        glue, "costs", lambda methods, rounds, dry_run: dict.fromkeys(methods, cost)
    )
    argv = [
        "--data",
        str(tmp_path),
        "--base",
        str(tmp_path),
        "--result",
        str(tmp_path / "glue.json"),
        "--jobs",
        "1",
    ]
    found = glue.main(argv)
    chosen = {
        name: (one["batch_size"], one["epochs"], one["learning_rate"])
        for name, one in found["best"].items()
    }
    assert chosen == {
        f"{task} {method}": (*glue.LONG, best[method]) for task in glue.TASKS for method in best
    }
    longer = [one for one in ran[27:45] if (one.task, one.method) == ("cola", "full")]
    assert {(one.batch_size, one.epochs, one.learning_rate) for one in longer} == {
        (8, 5, 1.5e-4),
        (8, 5, 8.7e-5),
    }
    assert len(ran) == 27 + 18 + 27 and {one.seed for one in ran[45:]} == set(glue.SEEDS)
    assert found["minus_full"]["lora"]["mean"] == pytest.approx(2.0)
    assert found["minus_full"]["qlora"]["mean"] == 0.0
    assert "lora - full: +2.00" in capsys.readouterr().out
    assert glue.main(argv)["scores"] == found["scores"] and len(ran) == 72, "nothing is run again"
    write_rows(tmp_path / "rte_dev.jsonl", [{"text": "b", "label": 1}])
    with pytest.raises(UserError, match="name another file with --result"):
        glue.main(argv)


@pytest.mark.parametrize("phase, held_out", [("tune", ()), ("final", ("rte_dev.jsonl",))])
def test_a_run_is_trained_as_its_name_says(tmp_path, monkeypatch, phase, held_out):
    """The words for the training script, read by its own parser; its scores come from the file of
    its metrics.
    """
    for part in ("train", "dev"):
        write_rows(tmp_path / f"rte_{part}.jsonl", [{"text": "a", "label": 1}])
    monkeypatch.setattr(glue, "TASKS", ("rte",))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    seen = []

    def said_by(script, flags, called, jobs):
        seen.append(parse(train_lora_classifier.Options, list(map(str, flags))))
        metrics = seen[0].out_dir / "metrics" / "x.jsonl"
        metrics.parent.mkdir(parents=True)
        write_rows(
            metrics,
            [{"step": 1}, {"summary": {"final": {"accuracy": 0.5}, "steps": 7, "seconds": 90}}],
        )

    monkeypatch.setattr(glue, "said_by", said_by)
    options = glue.Options(data=tmp_path, base=tmp_path, out_dir=tmp_path / "out")
    one = glue.Run("rte", "qlora", phase, 8, 5, 8.7e-4, 3)
    assert glue.train(one, options) == {"accuracy": 0.5, "steps": 7, "minutes": 1.5}
    (used,) = seen
    assert (used.batch_size, used.epochs, used.learning_rate, used.seed) == (8, 5, 8.7e-4, 3)
    assert used.load_in_4bit and used.target_modules == "all-linear" and used.rank == 8
    assert [path.name for path in used.data_path] == ["rte_train.jsonl"]
    assert tuple(path.name for path in used.val_path) == held_out
    assert not used.out_dir.exists(), "what was scored is deleted"


def test_an_encoder_without_weights_is_named(tmp_path):
    for task in glue.TASKS:
        for part in ("train", "dev"):
            write_rows(tmp_path / f"{task}_{part}.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match=r"nowhere has no model\.safetensors"):
        glue.main(
            ["--data", str(tmp_path), "--base", "nowhere", "--result", str(tmp_path / "glue.json")]
        )


def test_every_run_has_a_name_of_its_own():
    runs = [
        glue.Run("cola", "lora", phase, *size, rate, seed)
        for phase in ("tune", "final")
        for size in (glue.SHORT, glue.LONG)
        for rate in (1, 2)
        for seed in (0, 1)
    ]
    assert len({run.key for run in runs}) == len(runs)


def test_a_folder_without_all_tasks_is_named(tmp_path):
    write_rows(tmp_path / "cola_train.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(
        UserError, match="has no cola_dev, mrpc_train, mrpc_dev, rte_train, rte_dev with the ending"
    ):
        glue.main(["--data", str(tmp_path)])


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
