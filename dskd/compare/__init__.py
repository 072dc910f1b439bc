"""Comparison of runs: how their settings differ, how good, fast and costly they are, and how certain that is.

Reading order: choosing -> groups -> results -> metrics -> group_tests (with statistics) -> comparison -> tables, and
then text, pictures and report. This file imports nothing, so that the `dskd` command starts fast.
"""
