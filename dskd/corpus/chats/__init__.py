"""`corpus.source: chat`: chats from files or a dataset, as token sequences with a mask of what counts in the loss.

turns           parses a record into a chat: its turns, and the tools that the assistant may call
rendering       writes a chat with the teacher's chat template, and finds the tokens that the assistant says
left_out        names the parts of a turn that a chat template may leave out, and those that it must write
tool_results    finds a tool's result that is not in the place of its call
special_tokens  finds special tokens in what chats say
documents       reads all chats of the corpus, and refuses those that cannot be used, with their places
packing         packs whole chats into sequences
"""
