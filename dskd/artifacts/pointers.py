"""Detection of pointers: small text files that git-lfs and git-annex leave in place of a file that is not fetched."""

from pathlib import Path

from dskd.errors import UserError

# The first bytes of a pointer, and the command that replaces it by the file.
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": "`git lfs pull`",
    b"/annex/objects/": "`git annex get`",
}
_LONGEST = max(map(len, _POINTERS))


def refuse_pointer(path: Path) -> None:
    """Checks that a file is not a pointer of git-lfs or git-annex to the actual file.

    Raises:
        UserError: with the command that fetches the file, if it is a pointer.
    """
    with path.open("rb") as stream:
        refuse_pointer_beginning(stream.read(_LONGEST), path)


def refuse_pointer_beginning(beginning: bytes, name: object) -> None:
    """Does the same as :func:`refuse_pointer` for a file whose first bytes are already read.

    Args:
        beginning: the file's first bytes.
        name: the file, for the message.

    Raises:
        UserError: with the command that fetches the file, if it is a pointer.
    """
    for mark, command in _POINTERS.items():
        if beginning.startswith(mark):
            raise UserError(f"{name}: this is only a pointer of git to the file; fetch the file itself with {command}")
