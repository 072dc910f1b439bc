"""The sense dictionary (method, section 2): tokens and spans to sense embeddings.

entries     which tokens and spans there are, and which are synonyms and antonyms of which token
gather      the teacher's states, sampled per token, on the rank that owns the token
kmeans      the states of thousands of tokens at once to their centroids
spans       spans of two and three tokens, composed of their tokens' senses
dictionary  the file format, and reading rows of it without loading it
build       the stage that ties these together
"""
