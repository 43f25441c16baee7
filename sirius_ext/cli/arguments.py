"""How the command line reads its arguments. Whatever is wrong with one is a ValueError whose message begins with its name."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import os
import re
import reprlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeVar

from ..errors import reason

T = TypeVar("T")
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # what `add_subparsers` gives

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class Parser(argparse.ArgumentParser):
    """Raises a ValueError where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # argparse's own types are overloads
        """A command's own parser refuses what it does not know, and names it before anything else: what is missing may be there,
        but misspelt."""
        try:
            found, unknown = super().parse_known_args(args, namespace)
        except ValueError:
            if misspelt := [] if args is None else self._unknown_options(args):
                self._refuse(misspelt)
            raise
        if unknown and self._subparsers is None:
            self._refuse(unknown)
        return found, unknown

    def _unknown_options(self, arguments: Sequence[str]) -> list[str]:
        """Those that are no beginning of an option of this parser. What follows a command is its parser's."""
        if self._subparsers is not None:
            arguments = list(itertools.takewhile(lambda argument: argument.startswith("-"), arguments))
        names = (argument.partition("=")[0] for argument in itertools.takewhile(lambda argument: argument != "--", arguments))
        return [
            name
            for name in names
            if name.startswith("--") and " " not in name and not any(known.startswith(name) for known in self.options)
        ]

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        close = (difflib.get_close_matches(each.partition("=")[0], self.options, 1) for each in unknown if each.startswith("--"))
        meant = ", ".join(dict.fromkeys(itertools.chain.from_iterable(close)))
        self.error(f"unrecognized arguments: {' '.join(unknown)}{f'; did you mean {meant}?' if meant else ''}")

    @property
    def options(self) -> list[str]:
        """The long names of all of them."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]


def as_option(message: str, parser: Parser) -> str:
    """Inside, a setting is named as Python has it: at the beginning of a message, `tree_width: ...`, and where that speaks of
    another one, `accept="sample"`. Here it is the parser's option, if it has one of that name: `--tree-width: ...`, and
    `--accept sample`."""
    options = {option.removeprefix("--").replace("-", "_"): option for option in parser.options}
    name, colon, rest = message.partition(":") if ":" in message else ("", "", message)
    name = options.get(name) or options.get(f"no_{name}") or name
    # Not inside of a path, of an option, or of a mode with settings of its own (sirius-c:period=8).
    known = rf"(?<![\w:/.-])({'|'.join(options) or '(?!)'})"
    rest = re.sub(rf"{known}=(['\"]?)([\w.]+)\2", lambda found: f"{options[found[1]]} {found[3]}", rest)
    rest = re.sub(rf"{known}(?= >)", lambda found: options[found[1]], rest)
    return name + colon + re.sub(r'(?<=\bor )"(\w+)"', r"\1", rest)


def check_text(arguments: list[str]) -> None:
    """ValueError for one that is not text by the locale: Python hands its bytes on as characters that can be neither read nor
    written."""
    for at, argument in enumerate(arguments):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            option, equals, value = argument.partition("=")
            name, bad = (arguments[at - 1] if at else "", argument)
            if equals and option.startswith("--"):
                name, bad = option, value
            if not name.startswith("--"):
                name = f"argument {at + 1}"
            encoding, hint = sys.getfilesystemencoding(), ""
            if encoding != "utf-8":  # Python was told to go by a locale that has few characters
                hint = "; with PYTHONUTF8=1 in the environment it is UTF-8"
            raise ValueError(
                f"{name}: expected {encoding.upper()}, got the bytes {_short.repr(os.fsencode(bad))}{hint}"
            ) from error


def reads(parse: Callable[[str], T]) -> Callable[[str], T]:
    """What `add_argument` takes as a type. argparse replaces the message of a ValueError by one that names the function; this
    keeps it."""

    @functools.wraps(parse)
    def read(text: str) -> T:
        try:
            return parse(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(reason(error)) from error

    return read


def _number(text: str, kind: Callable[[str], T], what: str) -> T:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"expected {what}, got {_short.repr(text)}") from error


@reads
def integer(text: str) -> int:
    return _number(text, int, "an integer")


@reads
def number(text: str) -> float:
    return _number(text, float, "a number")


def integer_in(least: int, most: int) -> Callable[[str], int]:
    @reads
    def read(text: str) -> int:
        value = integer(text)
        if not least <= value <= most:
            raise ValueError(f"expected {least} to {most}, got {_short.repr(value)}")
        return value

    return read


def parse_period(text: str) -> int | str:
    return text if text == "auto" else _number(text, int, "an integer or auto")


period = reads(parse_period)


@reads
def density(text: str) -> float | str:
    return text if text == "auto" else _number(text, float, "a number or auto")


@reads
def words(text: str) -> list[str]:
    """With commas between them."""
    found = text.split(",")
    if "" in found:
        raise ValueError(f"expected one or several with commas between them, got {_short.repr(text)}")
    for word in found:
        if found.count(word) > 1:
            raise ValueError(f"expected each once, got {word} {found.count(word)} times")
    return found


@reads
def key(text: str) -> str:
    """A header must be able to hold it."""
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("expected printable ASCII characters without spaces")
    return text


@reads
def not_empty(text: str) -> str:
    if not text:
        raise ValueError("expected some text, got none")
    return text


# --------------------------------------------------------------------------------------------------------------------- paths
# Tried as they are read, so that nothing is lost by a wrong one: not even the time that a model takes to load.


def _path(text: str) -> Path:
    if not text:
        raise ValueError("expected a path, got an empty one")
    return Path(text)


@reads
def input_file(text: str) -> Path:
    path = _path(text)
    if path.is_dir():
        raise ValueError(f"expected a file, got the folder {text}")
    if not path.exists():
        raise ValueError(f"no file {text}")
    if path.is_file():  # a pipe could be read only once
        path.open("rb").close()
    return path


@reads
def input_text(text: str) -> Path:
    """A file, or - for standard input."""
    return Path(text) if text == "-" else input_file(text)


@reads
def input_folder(text: str) -> Path:
    path = _path(text)
    if not path.is_dir():
        raise ValueError(f"expected a folder, got the file {text}" if path.exists() else f"no folder {text}")
    return path


@reads
def output_file(text: str) -> Path:
    if text == "-":
        raise ValueError("expected a file, got -; ./- is one of that name")
    path = _path(text)
    if path.is_dir():
        raise ValueError(f"expected a file, got the folder {text}")
    if not _exists(path):
        _try_folder(Path(os.path.realpath(path)).parent)
    elif path.is_file():  # to open a pipe and close it would end it
        path.open("ab").close()
    return path


@reads
def output_text(text: str) -> Path:
    """A file, or - for standard output."""
    return Path(text) if text == "-" else output_file(text)


@reads
def output_folder(text: str) -> Path:
    """A folder, or one that can be made."""
    path = _path(text)
    if _exists(path) and not path.is_dir():
        raise ValueError(f"expected a folder, got the file {text}")
    _try_folder(path if path.is_dir() else Path(os.path.realpath(path)).parent)
    return path


def _exists(path: Path) -> bool:
    """OSError for a name that no file can have."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _try_folder(folder: Path) -> None:
    """By a file without a name: what is permitted says little about a full or a read-only disk, and another process may look for
    a file of the name that is wanted."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"no file can be written in {folder}: {error.strerror}") from error


def read_text(name: str, file: Path) -> str:
    """A text that is not empty. A byte order mark at its beginning is not part of it."""
    if str(file) == "-":
        if sys.stdin is None:
            raise ValueError(f"{name}: standard input is closed")
        content, called = sys.stdin.buffer.read(), "standard input"
    else:
        content, called = file.read_bytes(), str(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {called} is not UTF-8 text (byte {error.start}: {error.reason})") from error
    if not text:
        raise ValueError(f"{name}: {called} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text


def check_distinct(**files: str | os.PathLike[str] | None) -> None:
    """ValueError if two options name the same file, whose content one of them would cost. files: by their options' names."""
    known: dict[str, str] = {}
    for name, file in files.items():
        if file is not None and str(file) != "-":
            other = known.setdefault(os.path.realpath(file), name)
            if other != name:
                raise ValueError(f"{name}: expected another file than that of --{other.replace('_', '-')}, got {file} for both")
