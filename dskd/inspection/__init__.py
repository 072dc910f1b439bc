"""Looking at what was built: `dskd inspect word|lexicon|senses|plot`. Nothing here writes into an artifact.

artifacts   opening what is there, and saying what is not
tokens      tokens and spans as people read them
neighbours  the entries of the sense dictionary nearest to a row
contexts    places in the training shards where a row is the nearest sense
histogram   counts by powers of two, as text and as a picture
geometry    whether synonyms are nearer than antonyms
drawing     the picture of some entries, as numbers and drawn
labels      where the words of a picture go, so that they do not cover each other
word, lexicon, senses, plot
            the verbs: each computes a plain result, and formats it apart from that
"""
