"""The faults of python_tests/data/mutants fit the sources. mutants.py runs them."""

from mutants import ROOT, read_mutants, stale_reason, suite_of


def test_every_fault_can_be_written_and_has_tests() -> None:
    mutants = read_mutants()
    assert len(set(mutants)) == len(mutants) > 0
    for mutant in mutants:
        assert stale_reason(mutant, ROOT) is None, mutant
        assert mutant.new != mutant.old
        for name in suite_of(mutant.file):
            assert (ROOT / "python_tests" / f"test_{name}.py").is_file()
