"""The `dskd` command: a module a verb, with its parser and its run.

program    what all programs share: arguments, ranks, exit codes
launching  starting a program of `launcher/` on all ranks
compare, inspect, plan, senses
           the verbs
"""
