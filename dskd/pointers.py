"""Pointers that git-lfs and git-annex leave where a file has not been fetched."""

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
        start = stream.read(_LONGEST)
    for mark, command in _POINTERS.items():
        if start.startswith(mark):
            raise UserError(f"{path}: this is only a pointer of git to the file; fetch the file itself with {command}")
