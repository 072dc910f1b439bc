"""The sense dictionary (docs/method.md, section 2): tokens and spans to sense embeddings.

entries     which tokens and spans there are, and which are synonyms and antonyms of which token
states      the teacher's states of a batch, refused where one is not finite
gather      the teacher's states, sent to the rank that owns their token
reservoir   a random sample of each token's states, in bounded memory
kmeans      the states of thousands of tokens at once to their centroids
cluster     sampled states to sense embeddings
spans       spans of two and three tokens, composed of their tokens' senses
assemble    what the ranks computed, and the spans, to one file
dictionary  the file format, and reading rows of it without loading it
build       the stage that ties these together
merge       one dictionary of several
"""
