"""Running a model that is not trained.

frozen       runs the teacher, whole on every rank or sharded with ZeRO-3
precision    the number format that models run in
nvme         parameters on a local disk
packed_mask  builds the attention mask of packed documents
readouts     reads logits out of hidden states, chunk by chunk
generation   greedy generation, and the tokens that end it
sampling     sampled texts, with transformers' own generation
"""
