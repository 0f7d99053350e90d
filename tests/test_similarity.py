"""How alike two questions are: in characters, whatever the language, case and punctuation."""

import pytest

from dataset.questions import Neighbours, spread


@pytest.mark.parametrize(
    ("left", "right", "similarity"),
    [
        ("What is your name?", "What is your name?", 1.0),
        ("What is your name?", "  what is\nYOUR name", 1.0),
        ("you're", "youre", 1.0),
        ("what is", "whatis", 2 / 7),  # wha, hat of wha, hat, at_, t_i, _is, ati, tis
        ("What is your name?", "Bring milk", 0.0),
        ("abcd", "bcde", 1 / 3),  # abc, bcd; bcd, cde
        ("abcdef", "abc", 1 / 4),
        ("aaaaa", "aaa", 1.0),  # sets
        ("你叫什么名字？", "你叫什么名字", 1.0),
        ("你叫什么名字？", "请问你叫什么名字", 4 / 6),
        ("你是谁？", "天空是什么颜色？", 0.0),
        ("Hi!", "hi", 1.0),
        ("hi", "high", 0.0),  # a short text is one gram
        ("", "hi", 0.0),
    ],
)
def test_likeness_is_the_share_of_common_trigrams(left, right, similarity):
    for one, other in ((left, right), (right, left)):
        assert Neighbours([one]).similarity(other) == pytest.approx(similarity)
        among = Neighbours(["zzz", one, one, "一二三"])
        assert among.similarity(other) == pytest.approx(similarity), "the nearest counts"
    assert Neighbours([]).similarity(left) == 0


@pytest.mark.parametrize(
    ("count", "most", "chosen"),
    [(3, 5, [0, 1, 2]), (6, 3, [0, 2, 4]), (7, 3, [0, 2, 4]), (0, 3, [])],
)
def test_few_of_many_are_spread_over_all(count, most, chosen):
    assert list(spread(list(range(count)), most)) == chosen
