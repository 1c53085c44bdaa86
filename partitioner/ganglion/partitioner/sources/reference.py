"""What a person may call a model, in one grammar. Pure: nothing here looks at a disk or a network.

    org/name  org/name@revision  org/name:variant  org/name@revision:variant    a repository of the hub
    hf.co/org/name...  huggingface.co/org/name...  https://hf.co/org/name...    the same, never a local folder
    /path  ./path  ../path  ~/path  file.gguf                                   a local folder or GGUF file
    anything without a slash                                                    an embedded or deployed model's name

Names of a repository are those of the hub (ASCII letters, digits, `-`, `_`, `.`), and stricter: they are the same on
every file system. What is not canonical is refused, never repaired (E1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ganglion.wire.errors import InvalidRequest

REFERENCE_CHARACTERS: Final = 512
NAME_CHARACTERS: Final = 96  # of an organization, of a repository
PATH_CHARACTERS: Final = 512  # of a file inside a repository
DEFAULT_REVISION: Final = "main"

_HOSTS: Final = re.compile(r"(?:https://)?(?:www\.)?(?:hf\.co|huggingface\.co)/")
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./-]*[A-Za-z0-9_])?", re.ASCII)
_FILE: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_. ()+,=-]*[A-Za-z0-9_)])?", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
# Windows gives these to devices, with any ending.
_DEVICES: Final = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Repository:
    """A repository of the hub; revision None: its main branch, variant None: the checkpoint, or the usual GGUF file."""

    organization: str
    name: str
    revision: str | None = None
    variant: str | None = None

    @property
    def id(self) -> str:
        """`org/name`."""
        return f"{self.organization}/{self.name}"

    @property
    def wanted_revision(self) -> str:
        """The revision to ask for."""
        return self.revision or DEFAULT_REVISION

    @property
    def model_name(self) -> str:
        """What the API calls it: the repository's name in lower case without `-gguf`, and the variant after a colon."""
        name = self.name.lower()
        name = name.removesuffix("-gguf") or name
        return f"{name}:{self.variant.lower().removesuffix('.gguf')}" if self.variant else name

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.id}{revision}{f':{self.variant}' if self.variant else ''}"


@dataclass(frozen=True)
class LocalPath:
    """A folder or a file of this machine, as it was written."""

    text: str


@dataclass(frozen=True)
class Name:
    """An embedded model, or one that is cut or deployed."""

    text: str


Reference = Repository | LocalPath | Name


def parse_reference(text: str) -> Reference:
    """What `text` names. Raises InvalidRequest naming what is wrong with it."""
    _check_characters(text)
    if text.startswith(("/", "~", "./", "../")) or text in (".", ".."):
        return LocalPath(text)
    if _HOSTS.match(text) or "/" in text:
        return parse_repository(text)
    if text.lower().endswith(".gguf"):
        return LocalPath(text)
    return Name(text)


def parse_repository(text: str) -> Repository:
    """`[hf.co/]org/name[@revision][:variant]`. Raises InvalidRequest naming what is wrong with it."""
    _check_characters(text)
    rest = _HOSTS.sub("", text, count=1)
    rest, colon, variant = rest.partition(":")
    rest, at, revision = rest.partition("@")
    parts = rest.split("/")
    if len(parts) != 2:
        raise _refused(text, "a repository is org/name, optionally @revision and :variant")
    for what, part in zip(("organization", "name"), parts, strict=True):
        _check_name(text, what, part)
    if parts[1].endswith(".git"):
        raise _refused(text, "a repository's name does not end in .git")
    if at:
        _check_revision(text, revision)
    if colon:
        _check_name(text, "variant", variant)
    return Repository(parts[0], parts[1], revision if at else None, variant if colon else None)


def is_commit(text: str) -> bool:
    """Whether `text` is the full name of a commit."""
    return _COMMIT.fullmatch(text) is not None


def check_file(path: str) -> str:
    """`path` again when it is a canonical path inside a repository; raises InvalidRequest naming what is wrong."""
    if len(path) > PATH_CHARACTERS:
        raise InvalidRequest(f"file {path[:40]!r}…: {len(path)} characters, at most {PATH_CHARACTERS} are accepted")
    for part in path.split("/"):
        if not _FILE.fullmatch(part) or ".." in part or _DEVICES.fullmatch(part):
            raise InvalidRequest(f"file {path!r}: {part!r} is no name that every file system can hold")
    return path


def _check_characters(text: str) -> None:
    if not text:
        raise InvalidRequest("the model's name is empty", param="model")
    if len(text) > REFERENCE_CHARACTERS:
        raise _refused(text, f"{len(text)} characters, at most {REFERENCE_CHARACTERS} are accepted")
    for character in text:
        if not character.isprintable():
            raise _refused(text, f"it holds the control character U+{ord(character):04X}")
    if "\\" in text:
        raise _refused(text, "it holds a backslash; folders are separated by /")


def _check_name(text: str, what: str, name: str) -> None:
    if not name:
        raise _refused(text, f"the {what} is empty")
    if len(name) > NAME_CHARACTERS:
        raise _refused(text, f"the {what} has {len(name)} characters, at most {NAME_CHARACTERS} are accepted")
    for character in name:
        if not (character.isascii() and (character.isalnum() or character in "-_.")):
            raise _refused(
                text, f"the {what} holds {character!r} (U+{ord(character):04X}); letters, digits, - _ . are allowed"
            )
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise _refused(text, f"the {what} {name!r} begins or ends with - or ., or holds -- or ..")
    if _DEVICES.fullmatch(name):
        raise _refused(text, f"the {what} {name!r} is a device on Windows")


def _check_revision(text: str, revision: str) -> None:
    good = _REVISION.fullmatch(revision) and len(revision) <= 2 * NAME_CHARACTERS
    parts = revision.split("/")
    if not good or any(
        not part or part.startswith((".", "-")) or part.endswith((".", ".lock")) or ".." in part for part in parts
    ):
        raise _refused(text, f"{revision[:80]!r} is no branch, tag or commit")
    if any(_DEVICES.fullmatch(part) for part in parts):
        raise _refused(text, f"the revision {revision!r} is a device on Windows")


def _refused(text: str, why: str) -> InvalidRequest:
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return InvalidRequest(f"model {shown!r}: {why}", param="model")
