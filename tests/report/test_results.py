"""What results and pages need of the machine and of the files beside them."""

from latentcodec.report import results


def test_without_git_a_result_has_no_commit(tmp_path, monkeypatch):
    """A container may hold the checkout and not the program; what was measured must not be lost for it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.commit() is None
