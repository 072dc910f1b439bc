"""Comparison of runs: how their settings differ, how good, fast and costly they are, and how certain that is.

This file imports nothing, so that the `dskd` command starts fast. The modules, in reading order:

choosing       chooses tracked runs by experiment, tag, name or id
groups         groups runs that differ only in their seed
results        reads what runs scored in each evaluation, and refuses results from different data
continuations  reads how the models continue a few prompts
metrics        reads the last and best values and the histories of training from the tracking server
statistics     intervals over seeds, and paired tests
group_tests    tests each group against the baseline
comparison     puts these together: everything that a comparison shows
wording        names of metrics and formats of numbers, the same in text and report
tables         the tables, the same in text and report
text           prints the comparison in a terminal
pictures       draws loss curves, measures and differences
report         writes the HTML report
mlflow_link    the address of MLflow's own comparison of the runs
"""
