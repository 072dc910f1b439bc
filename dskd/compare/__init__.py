"""Runs side by side: what differs in their settings, how good, fast and costly they are, and how sure that is.

Reading order: choosing -> groups -> results -> metrics -> group_tests (with statistics) -> comparison, and from there
text, pictures and report. Nothing is imported here, so that the `dskd` command starts fast.
"""
