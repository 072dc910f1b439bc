"""Reports on what exists: `dskd inspect word|lexicon|senses|plot|shards` and others. Nothing here changes an artifact.

word          one word: its relations, tokens and senses
examples      the senses of a few words in short, for the end of the pipeline
lexicon       the sources of the pairs, and how much of the vocabulary they cover
senses        histograms and coverage of the sense dictionary
plot          computes the picture of some words' senses
shards        compares all shards with their hashes
drawing       draws that picture
labels        places its words so that they do not cover each other
geometry      measures whether synonyms are nearer than antonyms (`dskd senses geometry`)
layer_choice  what each layer of the teacher does, and which layers a student keeps (`dskd student --explain`)
artifacts     opens the artifacts that exist, and reports the missing ones
tokens        tokens and spans as readable text
neighbours    the entries of the sense dictionary nearest to a row
contexts      places in the training shards where a row is the nearest sense
histogram     counts by powers of two, as text and as a picture

The verbs' modules compute a plain result, and the first three also format it as text.
"""
