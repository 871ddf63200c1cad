"""What the tests of commands need: a standard input, and what a command looks like that failed."""

import io


class Stdin(io.TextIOWrapper):
    def __init__(self, data, terminal):
        super().__init__(io.BytesIO(data))
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def failed(result, status, *parts):
    """The command ended with this status and one line on standard error that holds all parts, and printed nothing."""
    assert result[0] == status
    assert result[1] == ""
    assert result[2].count("\n") == 1, result[2]
    assert "Traceback" not in result[2]
    for part in parts:
        assert part in result[2]
    return True
