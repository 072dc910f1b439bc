"""Reports on finished artifacts: `dskd inspect word|lexicon|senses|plot`. Nothing here writes into an artifact.

artifacts   opening the artifacts that exist, and reporting the missing ones
tokens      tokens and spans as readable text
neighbours  the entries of the sense dictionary nearest to a row
contexts    places in the training shards where a row is the nearest sense
histogram   counts by powers of two, as text and as a picture
geometry    a measurement of whether synonyms are nearer than antonyms
drawing     drawing the picture of some entries
labels      placing the words of a picture so that they do not cover each other
word, lexicon, senses, plot
            the verbs: each has a function that computes a plain result; the first three format it in another
"""
