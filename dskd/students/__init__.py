"""The student before training: cut from the teacher, another pretrained model, or new.

student         the student of a work directory: finding it, making it, and whether it is the one that the config names
cutting         cuts it from the teacher's files
spacing         which of the teacher's layers it keeps
importance      computes how much layers change the states
measuring       runs the teacher on training text to measure its layers that way
copies          whether its chat template and generation config are still those of the model it is made from
pretrained      copies a pretrained model
new             makes one of given sizes with random weights
same_tokenizer  compares a pretrained student's tokenizer with the teacher's
pruned_teacher  checks that a cut student computes what the teacher computes without the other layers
"""
