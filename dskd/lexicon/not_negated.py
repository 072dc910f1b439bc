"""English words that look negated but are not, although MorphoLEX labels their affix as a negating one.

They were collected by reading all words of MorphoLEX for which :mod:`dskd.lexicon.negation` finds a base. There are
three kinds: the affix has another meaning (dismiss is not the opposite of miss, unravel is the same as ravel), the
word's meaning has drifted (uncanny, listless), or the rest is another word with the same spelling (impair, discord).
"""

_FAMILIES = (
    # un-: the same as the base, or to remove what it names
    "unbosom unearth unhand unhing unhorse unloose unnerve unpick unravel unrip unthaw",
    # dis-: apart, away
    "disabuse disaffect disappoint disbar discard discharg disclos discommod disconcert discord discount discriminat",
    "disfigur disgorg disgrac disguis dislocat dismantl dismember dismiss dispatch displac disport dispose disposi",
    "dissever dissolu distemper distend distort distract distribut",
    # im-: into, in, an intensive, or another word without it
    "immemorial impair impartially impassion impassive impediment inclose incommod incorporat indifferen",
    "indirection inflam inflorescence inlay innumerabl inordinate invaluable irrespective",
    # -less: without, or too many to have one
    "bootless countless handless listless numberless priceless regardless shiftless wireless",
)
_BEGINNINGS = tuple(" ".join(_FAMILIES).split())
_WORDS = frozenset(
    ("indelicacies", "infidel", "inhumanities", "nonism", "uncanny", "unman", "unmanning", "unmans", "untoward")
)


def is_not_negated(word: str) -> bool:
    """Returns True if a word, in lower case, is one of these: by itself, or as one of a family (discard, discarded)."""
    return word in _WORDS or word.startswith(_BEGINNINGS)
