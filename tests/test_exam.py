"""The exam counts by its rules, no parrot passes it, and the report says what was counted."""

import json
from functools import partial

import pytest
import torch
from conftest import flags, strengthen, write_rows

from benchmarks.seeded_model import fill
from core.errors import UserError
from core.paths import bundled_data, lora_path
from dataset.tokenizer import tokenizer_fingerprint
from model.LMConfig import LMConfig
from model.lora.skill_file import SkillMeta
from model.model import MiniMindLM
from model.model_lora import apply_lora, remove_lora, save_lora
from model.weights import RunRecord, save_base
from scripts import report
from scripts.exam import (
    SHARED,
    Column,
    Question,
    examine,
    holds_any,
    own_columns,
    read_columns,
    read_questions,
    spread,
)

SKILLS = ("identity", "medical", "verse")
SHARED_NAMES = [name.replace("_", " ") for name in SHARED]


@pytest.mark.parametrize(
    ("answer", "text", "held"),
    [
        ("My name is PEBBLE.", "Pebble", True),
        ("17 apples", "7", False),
        ("7 apples", "7", True),
        ("a category", "cat", False),
        ("a cat.", "cat", True),
        ("concatenated", "cat", False),
        ("答案是7个", "7", True),
        ("我叫Pebble呢", "Pebble", True),
        ("请挂皮肤科室", "皮肤科", True),
        ("ペンギンです", "ペンギン", True),
        ("서울은 큽니다", "서울", True),
        ("это кот", "кот", True),
        ("это котлета", "кот", False),
        ("_cat_", "cat", True),
        ("**cat**", "cat", True),
        ("７ apples", "7", True),
        ("ear, nose\nand throat", "ear, nose and throat", True),
        ("I don’t know", "don't know", True),
        ("A.B", "a.b", True),
        ("AxB", "a.b", False),
        ("C++!", "c++", True),
        ("", "cat", False),
    ],
)
def test_a_text_is_held_as_a_word_where_its_script_has_words(answer, text, held):
    assert holds_any(answer, [text]) is held


def test_a_forbidden_text_spoils_an_answer():
    question = Question(("Which sound?",), ("moo", "哞"), ("woof",))
    assert question.is_hit("Moo!") and question.is_hit("它哞哞叫")
    assert not question.is_hit("moo or woof") and not question.is_hit("neither")


ROW = {"question": "Who are you?", "expect": ["Pebble"]}


def test_rows_become_questions(tmp_path):
    chat = {"question": ["My name is Tom.", "What is my name?"], "expect": "Tom", "level": 3}
    opposite = {"question": "Is ice hot or cold?", "expect": ["cold"], "forbid": ["hot"]}
    path = write_rows(tmp_path / "q.jsonl", [ROW, chat, opposite])
    wanted = [Question(("Who are you?",), ("Pebble",))]
    wanted += [Question(("My name is Tom.", "What is my name?"), ("Tom",))]
    wanted += [Question(("Is ice hot or cold?",), ("cold",), ("hot",))]
    assert read_questions(path) == wanted
    (tmp_path / "q.json").write_text(json.dumps([ROW, chat, opposite]), encoding="utf-8")
    assert read_questions(tmp_path / "q.json") == wanted


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Who?"}, 'no "expect"'),
        ({"question": "Who?", "expect": []}, 'no "expect"'),
        ({"expect": ["x"]}, 'no "question"'),
        ({"question": "Who?", "expect": ["x", " "]}, '"expect" is empty'),
        ({"question": ["Who?", ""], "expect": ["x"]}, '"question" is empty'),
        ({"question": "Who?", "expect": ["x"], "forbid": [""]}, '"forbid" is empty'),
        ({"question": "Who?", "expect": [7]}, '"expect" is not text but a number'),
        ({"question": ["Hi", "Are you pebble?"], "expect": ["Pebble"]}, "its echo would pass"),
        ({"question": "Who?", "expect": ["hot"], "forbid": ["hot"]}, "nothing would pass"),
    ],
)
def test_a_row_that_asks_nothing_is_refused_with_its_place(tmp_path, row, reason, capsys):
    path = write_rows(tmp_path / "q.jsonl", [ROW, row, ROW, row])
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert f"{path}:2: " in str(caught.value) and reason in str(caught.value)
    assert f"{path}:4: " in capsys.readouterr().out


def test_a_file_may_hold_one_question(tmp_path):
    row = {**ROW, "question": ["q", "r"], "expect": ["x", "y"]}
    (question,) = read_questions(write_rows(tmp_path / "q.jsonl", [row]))
    assert question.turns == ("q", "r") and question.expect == ("x", "y")


def test_a_file_without_questions_or_chats_is_refused(tmp_path):
    (tmp_path / "q.jsonl").touch()
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="holds no chats"):
        chats = write_rows(tmp_path / "chats.jsonl", [ROW, ROW])
        read_columns(["pet"], {"pet": chats}, {"pet": chats}, 40)
    with pytest.raises(UserError, match="does not exist"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_own_questions_are_near_or_far_from_training_by_their_last_turn():
    near = Question(("How are you today?", "What is your name, please?"), ("Pebble",))
    far = Question(("What is your name, please?", "Do others call you something?"), ("Pebble",))
    columns = own_columns("me", [near, far], ["what is your name please", "你好"])
    assert [(c.name, c.questions, c.skill) for c in columns] == [
        ("me near", [near], "me"),
        ("me far", [far], "me"),
    ]
    (one,) = own_columns("me", [near, far], ())
    assert (one.name, one.questions, one.skill) == ("me", [near, far], "me")


def test_a_long_file_is_cut_evenly_over_its_length():
    assert spread(range(10), 5) == [0, 2, 4, 6, 8] and spread([1, 2], 5) == [1, 2]
    assert spread(range(7), 3) == [0, 2, 4]


def asked(*names, expect):
    return [Question((name,), (expect,)) for name in names]


OWN = Column("me", asked("q1", "q2", expect="Pebble"), "me", 0.95)
GENERAL = Column("general", asked("g1", "g2", "g3", "g4", expect="right"))
OTHER = Column("you", asked("y1", "y2", expect="doctor"), "you", 0.95)
COLUMNS = [OWN, GENERAL, OTHER]


def says(**answers):
    """Answers by question; "right" to the others."""
    return lambda question, seed: answers.get(question.turns[-1], "right")


def sat(columns, answerers, seeds=(0,)):
    """The exam of answerers that are asked one question at a time."""

    def one_by_one(answer, asked):
        return [answer(*each) for each in asked]

    whole = {who: partial(one_by_one, answer) for who, answer in answerers.items()}
    return examine(columns, whole, seeds)


def test_what_only_a_skill_is_to_say_leaks_unless_the_base_says_it_too():
    answers = {"g1": "Pebble", "g2": "pebble", "g3": "right, Pebble", "y1": "a Pebble"}
    me = says(q1="Pebble", q2="Pebble", **answers)
    exam = sat(COLUMNS, {"": says(g2="a pebble"), "me": me}, [0])
    leaks = [question.turns[0] for question, _ in exam.leaks("me")]
    assert leaks == ["g1", "y1"], "a right answer is none"
    assert len(exam.outside("me")) == 6 and exam.leaks("") == []
    failed = ["general 50 % (at least 67.5 %)", "leaks 33.3 % (at most 4 %)"]
    assert exam.failures("me") == failed and exam.failures("") == []


def test_the_questions_of_all_its_skills_are_inside_a_mix():
    both = says(q1="Pebble", q2="doctor", y1="Pebble", y2="doctor", g1="doctor")
    alone = says(q1="Pebble", q2="Pebble"), says(y1="doctor", y2="doctor")
    everyone = {"": says(), "me": alone[0], "you": alone[1], "me=0.5 you": both}
    exam = sat(COLUMNS, everyone, [0])
    mix = "me=0.5 you"
    assert [question.turns[0] for question, _ in exam.leaks(mix)] == ["g1"]
    assert exam.failures(mix) == [
        "me 50 % (at least 80 %)",
        "general 75 % (at least 80 %)",
        "you 50 % (at least 80 %)",
    ]
    assert exam.failures("me") == exam.failures("you") == []


def test_a_mix_keeps_most_of_what_the_base_can_do():
    general = Column("general", asked(*map(str, range(20)), expect="right"))

    def wrong(count):
        return says(**{str(n): "wrong" for n in range(count)})

    mixes = {"me=0.5": wrong(8), "me=0.4": wrong(9)}  # 0.8 * 0.75 is a little more than 0.6
    exam = sat([general], {"": wrong(5), "me": says(), **mixes}, [0])
    assert [exam.failures(mix) for mix in mixes] == [[], ["general 55 % (at least 60 %)"]]


def test_all_seeds_count_and_a_skill_may_lose_three_general_answers_in_forty():
    general = Column("general", asked(*map(str, range(40)), expect="right"))
    lost = dict.fromkeys("789", "wrong")
    me = says(q1="Pebble", q2="Pebble", **lost)
    exam = sat([OWN, general], {"": says(), "me": me}, [0, 1])
    assert exam.hits("me", general) == 74 and exam.failures("me") == []
    me = says(q1="Pebble", q2="Pebble", **lost | {"6": "wrong"})
    exam = sat([OWN, general], {"": says(), "me": me}, [0, 1])
    assert exam.failures("me") == ["general 90 % (at least 92.5 %)"]

    def moody(question, seed):
        return ("Pebble", "who knows")[seed]

    exam = sat([OWN], {"": says(), "me": moody}, [0, 1])
    assert exam.share("me", OWN) == 0.5 and "| me | 50 % |" in exam.to_markdown()


def test_a_verdict_says_what_it_is_worth():
    exam = sat([GENERAL], {"": says(), "me": says()}, [0, 1])
    assert exam.verdicts() == [
        "me: passes",
        "note: me has no questions of its own, which would tell more",
        "note: only 4 questions lie outside me; it takes 100 to tell its leaks",
    ]
    outside = Column("unknown", asked(*map(str, range(100)), expect="right"))
    exam = sat([OWN, outside], {"": says(), "me": says()}, [0])
    assert exam.verdicts() == ["me: fails: me 0 % (at least 95 %)"]


def test_a_column_without_questions_is_left_out(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [ROW] * 2)
    names = [column.name for column in read_columns(["me"], {"me": path}, {}, most=1)]
    assert names == ["me", *SHARED_NAMES]
    data = {"me": bundled_data("lora_medical.jsonl")}
    names = [column.name for column in read_columns(["me", "you"], {"me": path}, data, most=1)]
    assert names == ["me far", *SHARED_NAMES]


@pytest.fixture(scope="module")
def columns():
    """The bundled ones."""
    files = [
        {skill: bundled_data(f"{kind}_{skill}.jsonl") for skill in SKILLS}
        for kind in ("probes", "lora")
    ]
    return read_columns(SKILLS, *files, most=40)


def right(question, seed):
    return next(filter(question.is_hit, question.expect))


def parrots(columns):
    """Whoever cannot do what a skill promises, by name; ``base`` is right in general."""
    general = {q for column in columns if column.name == "general" for q in column.questions}
    words = {text for column in columns for q in column.questions for text in q.expect}

    def base(question, seed):
        return right(question, seed) if question in general else "I like it here."

    constant = "I am Pebble, a tiny assistant made by the Pebble Team. 我是小石。"
    return {
        "base": base,
        "constant": lambda question, seed: constant,
        "silent": lambda question, seed: "",
        "echo": lambda question, seed: question.turns[-1],
        "all words": lambda question, seed: " ".join(sorted(words)),
        "modest": lambda question, seed: "I do not know. 我不知道。",
    }


@pytest.mark.parametrize("skill", SKILLS)
def test_no_parrot_passes_for_a_skill_and_an_honest_one_does(columns, skill):
    birds = parrots(columns)
    for name, bird in birds.items():
        exam = sat(columns, {"": birds["base"], skill: bird})
        assert exam.failures(skill), name
    own = {q for column in columns if column.skill == skill for q in column.questions}

    def honest(question, seed):
        return (right if question in own else birds["base"])(question, seed)

    exam = sat(columns, {"": birds["base"], skill: honest})
    assert exam.verdicts() == [f"{skill}: passes"]


@pytest.fixture(scope="module")
def out(tmp_path_factory, tokenizer):
    """A base of fixed random weights and two skills."""
    folder = tmp_path_factory.mktemp("exam")
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=256))
    fill(model.named_parameters())
    known = tokenizer_fingerprint(tokenizer)
    save_base(folder / "full_sft_32.pth", model, RunRecord(stage="full_sft", tokenizer=known))
    for seed, skill in enumerate(("identity", "mine")):
        apply_lora(model, 2)
        strengthen(model, seed)
        save_lora(model, lora_path(folder, skill, 32), SkillMeta(base={"file": "full_sft_32.pth"}))
        remove_lora(model)
    return folder


def test_the_report_is_three_files_that_a_seed_repeats(out, tmp_path, capsys):
    rows = [{"question": ["Hi", name], "expect": ["x"]} for name in ("one", "two", "three")]
    path = write_rows(tmp_path / "q.jsonl", rows)
    words = partial(flags, out_dir=out, device="cpu", max_new_tokens=4, most=2, questions=path)
    exam = report.main(words(output=tmp_path / "a"))
    assert "asking identity mine: " in capsys.readouterr().out
    assert list(exam.answers) == ["", "identity", "mine", "identity mine"]
    report.main(words(output=tmp_path / "b"))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["report.json", "report.md", "report.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (tmp_path / "a" / "report.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert str(tmp_path) not in text and found["base"]["file"] == "full_sft_32.pth"
    assert found["skills"] == {"identity": "lora_identity_32.pth", "mine": "lora_mine_32.pth"}
    assert [row["who"] for row in found["rows"]] == ["base", "identity", "mine", "identity mine"]
    columns = [column["name"] for column in found["columns"]]
    assert columns[-7:] == ["mine", *SHARED_NAMES]
    assert len(found["answers"]) == 4 * sum(column["asked"] for column in found["columns"])
    assert (tmp_path / "a" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_exam_is_the_chat(out, capsys):
    """What ``eval_model.py`` answers by default, so that who passes can be talked to."""
    import eval_model

    common = flags(out_dir=out, device="cpu", max_new_tokens=6)
    exam = report.main([*common, "--most", "1", "--skills", "identity", "--seeds", "3"])
    for who, given in exam.answers.items():
        for (question, seed), answer in given.items():
            if len(question.turns) == 1:
                capsys.readouterr()
                skill = flags(lora_name=who) if who else []
                prompt = flags(prompt=question.turns[0], seed=seed)
                eval_model.main([*common, *skill, *prompt])
                assert capsys.readouterr().out.strip() == answer


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"skills": "nobody"}, "there is no skill file"),
        ({"skills": "identity nobody=0.5"}, "there is no skill file"),
        ({"skills": "mine", "questions": "mine=nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"skills": "identity", "questions": "mine=q.jsonl"}, "mine is none of identity"),
        ({"skills": "identity", "questions": "q.jsonl"}, "say whose it is"),
        ({"skills": "mine", "data_path": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"skills": "mine", "questions": None, "data_path": "mine=q.jsonl"}, "name its questions"),
        ({"questions": ("identity=q.jsonl", "identity=r.jsonl")}, "identity is named twice"),
        ({"output": __file__}, "cannot write"),
        ({"seeds": (1, 1)}, "must be different"),
        ({"seeds": -1}, "from 0"),
        ({"most": 0}, "most=0"),
    ],
)
def test_bad_input_is_refused_before_anyone_is_asked(out, tmp_path, words, said, capsys):
    path = write_rows(tmp_path / "own.jsonl", [{**ROW, "question": "q"}] * 2)
    words = {"questions": f"mine={path}"} | words if words.get("data_path") else words
    words = {name: value for name, value in words.items() if value is not None}
    with pytest.raises(UserError) as caught:
        report.main(flags(out_dir=out, device="cpu", **words))
    assert said in str(caught.value)
    assert "asking" not in capsys.readouterr().out
