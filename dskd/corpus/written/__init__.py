"""Text that the teacher writes itself, `corpus.source: teacher`: one text or more for every sense of a word.

requests    the texts to write: which word in which sense of WordNet
prompts     a request as the prompt of a chat model, or as the beginning of a text for a base model
write       the stage: writes `WORKDIR/written` in blocks, and resumes after the blocks that an interruption left
blocks      the blocks, and the file of all texts
local       writes blocks with the teacher, on all ranks
server      writes blocks with a server that has OpenAI's chat completions
connection  requests to the server: time limits, further tries, errors without its key
answers     texts and names of models in the server's answers
judging     which texts become documents of the corpus, why others do not, and which senses have text
"""
