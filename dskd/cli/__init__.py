"""The command line: one module per verb of `dskd`, with its parser and its run function.

program    shared by all programs: arguments, overrides, ranks, exit codes
launching  starts a program of `launcher/` on all ranks
stages     lexicon, student, export: the stages that run in one process
config, wordnet, status, preflight, compare, inspect, plan, senses
           the verbs of the same name
"""
