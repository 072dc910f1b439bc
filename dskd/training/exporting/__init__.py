"""Export: a checkpoint becomes a folder that transformers loads, with a model card and licences.

export      writes the folder, and checks it before it is published
files       its small files: configs, chat template, licences
rehearsal   exports the untrained student before the first step, to see early whether exporting will work
card        writes the model card
card_facts  collects from manifests what the card says
licences    licences of models, and what they ask of models made from them
"""

HELD_OUT_TEXT = "held-out-text"  # the name of the evaluated data on model cards; here, so that it is read without torch
