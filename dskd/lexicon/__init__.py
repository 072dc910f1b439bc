"""The lexicon (docs/method.md, section 1): lexical resources to synonyms and antonyms.

relations          what a relation is, the rules that make a table of them, and the table on disk
reading            text files of lexical resources, streamed, with what is wrong in them remembered
wordnet            finding WordNet, and opening it
languages          the Open Multilingual Wordnet
wordnet_relations  relations of WordNet in English and other languages
wiktionary         Wiktionary as Wiktextract's JSON lines
dict2vec           Dict2Vec's pair lists
tsv                the user's own lists
morpholex          how English words are made of affixes and roots
negation           words with a negating affix count as their base, negated
build              the stage that ties these together
"""
