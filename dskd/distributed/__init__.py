"""Ranks: who they are, how they meet, and what they do together.

world       which rank this process is, of how many
rendezvous  how ranks find each other, and who is missing
collectives sums, broadcasts and barriers
peers       noticing that another rank has gone
stopping    ending after the same step on all ranks
node_cache  what the ranks of a node share
"""
