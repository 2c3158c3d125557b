"""What runs by default of a table of cases."""

from covers import covered, some


def default(cases):
    return [case.values for case in cases if not case.marks]


def test_every_entry_runs_by_default():
    cases = covered("abcd", [1, 2], "xyz")
    assert len({case.values for case in cases}) == 24 and len(default(cases)) == 4
    assert [set(column) for column in zip(*default(cases))] == [set("abcd"), {1, 2}, set("xyz")]


def test_some_run_by_default():
    assert default(some([(1, "a"), (2, "b"), (3, "c")], 2)) == [(1, "a"), (3, "c")] and default(some("ab", 2)) == [
        ("a",)
    ]
