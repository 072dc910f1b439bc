"""Pointers: small texts that git-lfs and git-annex leave in the place of a file that has not been fetched."""

from pathlib import Path

from dskd.errors import UserError

# The first bytes of a pointer, and the command that puts the file in its place.
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": "`git lfs pull`",
    b"/annex/objects/": "`git annex get`",
}
_LONGEST = max(map(len, _POINTERS))


def refuse_pointer(path: Path) -> None:
    """Refuses a file that is a pointer of git-lfs or git-annex to the file that should be there.

    Raises:
        UserError: with the command that fetches the file.
    """
    with path.open("rb") as stream:
        refuse_pointer_beginning(stream.read(_LONGEST), path)


def refuse_pointer_beginning(beginning: bytes, name: object) -> None:
    """Does the same for a file of which some first bytes are known.

    Args:
        beginning: the file's first bytes.
        name: the file, for the message.

    Raises:
        UserError: with the command that fetches the file.
    """
    for mark, command in _POINTERS.items():
        if beginning.startswith(mark):
            raise UserError(f"{name}: this is only a pointer of git to the file; fetch the file itself with {command}")
