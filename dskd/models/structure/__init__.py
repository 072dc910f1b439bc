"""The parts of a model, and building it from a folder.

base_model    finds the base model of a causal LM, which computes hidden states
stored_names  the names of a model's tensors in its folder, and the check that none is missing or left over
causal_lm     builds a causal LM and fills it with a folder's weights
cut_config    the student's config.json
layers        a model's layers: their kinds, and the states that enter and leave them
trained       which of a student's parameters are trained
trunk         the lowest layers that teacher and student share: how many, and the states that leave them
final_norm    finds the parameters of a decoder's final norm
output_head   from last hidden states to logits: the output matrix, and what a model does with its products
"""
