"""Artifacts: folders on disk with a manifest, written under another name and renamed when they are whole.

kinds        each kind's folder, the command that makes it, and the version of its format
manifest     what an artifact was made from, and whether it is up to date
building     making one, under its lock
hashing      digests of files and of JSON values
files        folders and files, written whole or not at all; what a full disk means
lock         one process at a time
tensor_file  safetensors files, larger than memory
mds          reading samples of MDS shards
"""
