"""A user's error is one line that any terminal can show, whatever the value in it holds."""

import pickle

from irkd_dist.errors import LONGEST, Passing, UserError, printable


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable("a\x1b[2Jb\0\udcffü[red]") == "a\\x1b[2Jb\\x00\\udcffü[red]"
    assert str(UserError("no file 'a\nb\u2028\x9b'")) == "no file 'a\\nb\\u2028\\x9b'"
    str(Passing("bad \udcff")).encode()  # a lone surrogate would be refused


def test_a_message_that_is_too_long_loses_its_middle() -> None:
    error = UserError(f"key={'x' * 100_000}; use 3")
    assert len(str(error)) <= LONGEST
    assert str(error).startswith("key=xxx")
    assert str(error).endswith("xxx; use 3")
    assert "... (98071 characters) ..." in str(error)
    again = pickle.loads(pickle.dumps(error))  # as processes send it to one another
    assert str(again) == str(error)
