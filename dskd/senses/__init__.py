"""The sense dictionary (docs/method.md, section 2): tokens and spans to sense embeddings.

entries     the tokens and spans of the dictionary, and each token's synonyms and antonyms
csr         lists of different lengths in one tensor, such as the rows of each entry
states      the teacher's states for a batch, checked to be finite
gather      runs the teacher and sends each state to the rank that owns its token
reservoir   a random sample of each token's states, in bounded memory
distances   squared distances in batches
kmeans      k-means for thousands of tokens at once
cluster     turns sampled states into sense embeddings
spans       composes spans of two and three tokens from their tokens' senses
assemble    joins the parts that the ranks computed, and the spans, into one file
dictionary  the file format, and how to read rows without loading the file
build       the stage that ties these together
merge       merges several dictionaries into one
"""
