"""Artifacts: folders on disk with a manifest, written under a hidden name and renamed when they are complete.

kinds        the folder, command and format version of each kind
manifest     an artifact's origin, and the check that it is up to date
building     building an artifact under its lock
hashing      digests of files and of JSON values
files        writing folders and files completely or not at all
disk_space   checking for enough disk space, and reporting a full disk
lock         locks that one process at a time can hold
tensor_file  safetensors files that are larger than memory
mds          reading samples of MDS shards
pointers     refusing files that git-lfs or git-annex has not fetched
"""
