"""Pointers of git-lfs: three lines of text that stand in a repository for a large file, until it is fetched."""

_BEGINNING = b"version https://git-lfs.github.com/spec/"
GIT_LFS_POINTER = (
    "this is a pointer of git-lfs, which stands for the file itself; fetch it with `git lfs pull` in its repository"
)


def is_git_lfs_pointer(beginning: bytes) -> bool:
    """Returns whether a file that begins so is a pointer."""
    return beginning.startswith(_BEGINNING)
