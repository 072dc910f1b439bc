"""The command line: one module per verb of `dskd`, with its parser and its run function.

program    shared by all programs: arguments, ranks, exit codes
launching  starts a program of `launcher/` on all ranks
compare, inspect, plan, senses
           the verbs
"""
