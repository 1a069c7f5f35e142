"""One line out of a hundred: what is wrong, without how the parser came to see it."""

from __future__ import annotations

import itertools
import re

_KEY = re.compile(r'^Parser key "(?P<key>[^"]+)":?$')
_CLASS = re.compile(r"^Problem with given class_path '(?P<name>[^']+)':?$")
_TYPE = re.compile(r"^Expected an? ")  # the branch of a union that was not meant
_TREE = re.compile(r"Parser key \"|Problem with given class_path|Does not validate against any of")
_NOISE = re.compile(r"^(Does not validate against any of|Subtypes: |Errors:$|Given value( type)?: |$)")


class CommandError(Exception):
    """A mistake in what was asked for; its message is all that the user needs to see."""


def innermost_cause(error: BaseException) -> str:
    """What is at the bottom of an exception, in one line.

    jsonargparse reports a mistake by nesting, level by level of the configuration, every way in which it failed to
    make sense of it. The deepest line of that tree is the cause; the keys on the way to it say where it is.

    Args:
        error: Any exception.

    Returns:
        ``<key> (<class>): <cause>``, or the exception's own message where it is not such a tree.

    Example:
        >>> innermost_cause(ValueError('''Parser key "data":
        ...   Does not validate against any of the Union subtypes
        ...   Errors:
        ...     - Problem with given class_path 'Federated':
        ...         Parser key "partition":
        ...           Expected one of iid, shards
        ...     - Expected a <class 'NoneType'>
        ...   Given value type: <class 'dict'>'''))
        'data.partition (Federated): Expected one of iid, shards'
    """
    message = str(error)
    if isinstance(error, KeyError) or not message.strip():
        message = f"{type(error).__name__}: {message}"
    if not _TREE.search(message):
        return " ".join(message.split())
    best: tuple[tuple[bool, int], str] = ((False, -1), message)
    path: list[tuple[int, str]] = []  # the open levels: indentation, line
    lines = message.splitlines()
    for number, line in enumerate(lines):
        depth, text = _split(line)
        if _NOISE.match(text):
            continue
        path = [(level, above) for level, above in path if level < depth]
        if _KEY.match(text) or _CLASS.match(text):
            path.append((depth, text))
            continue
        rank = (not _TYPE.match(text), depth)
        if rank > best[0]:
            best = rank, _where([above for _, above in path]) + " ".join([text, *_continued(lines[number:])])
    return " ".join(best[1].split())


def _split(line: str) -> tuple[int, str]:
    text = line.strip()
    return len(line) - len(line.lstrip()), text.removeprefix("- ")


def _continued(lines: list[str]) -> list[str]:
    """The further lines of the message that the first line begins."""
    first, *rest = lines
    depth = _split(first)[0] + (first.lstrip().startswith("- "))
    taken = itertools.takewhile(lambda line: _split(line)[0] >= depth and not _NOISE.match(_split(line)[1]), rest)
    return [line.strip() for line in taken]


def _where(levels: list[str]) -> str:
    keys = [found["key"] for level in levels if (found := _KEY.match(level))]
    classes = [found["name"].rpartition(".")[2] for level in levels if (found := _CLASS.match(level))]
    where = ".".join(keys) + (f" ({classes[-1]})" if classes else "")
    return f"{where.strip()}: " if where else ""
