"""The lexicon (docs/method.md, section 1): synonyms and antonyms from lexical resources.

relations          the relation type, the rules for a table of relations, and the table on disk
reading            streams text files of lexical resources, and records malformed lines
wordnet            finds WordNet and opens it
languages          opens languages of the Open Multilingual Wordnet
wordnet_relations  reads WordNet's relations, in English and other languages
wiktionary         reads Wiktionary from Wiktextract's JSON lines
dict2vec           reads Dict2Vec's pair lists
tsv                reads the user's own lists
morpholex          reads MorphoLEX: the affixes and roots of English words
negation           replaces a word that has a negating affix by its base, negated
not_negated        lists words that look negated but are not
build              the stage that ties these together
"""
