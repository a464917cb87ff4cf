"""What a command line is told that lacks something: the words that a user would have had to write."""

import pytest

from latentcodec.training.config import parse


def test_a_missing_folder_of_the_run_is_named_as_it_is_given(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--train.lr", "1e-3"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --output_dir must be given; --help says what it is\n"
