"""Text of files that a stranger may have written, as a terminal may show it."""


def obeyed_by_none(text: str) -> str:
    r"""Text with its lines and tabs, and without anything else that a terminal would obey.

    >>> obeyed_by_none("one\ntwo \x1b[31m")
    'one\ntwo ?[31m'
    """
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)


def plain(text: str) -> str:
    r"""The same on one line.

    >>> plain("one\ntwo \x1b[31m")
    'one two ?[31m'
    """
    return obeyed_by_none(" ".join(text.split()))
