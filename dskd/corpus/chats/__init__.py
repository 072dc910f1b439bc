"""`corpus.source: chat`: chats from files or a dataset, as token sequences with a mask of what counts in the loss.

turns           parses a record into a chat: its turns, and the tools that the assistant may call
rendering       writes a chat with the teacher's chat template, and finds the tokens that the assistant says
special_tokens  finds special tokens in what chats say
left_out        decides which parts of a turn a chat template may leave out
tool_results    finds the tool call whose result a tool turn gives
documents       reads all chats of the corpus, and refuses those that cannot be used, with their places
packing         packs whole chats into sequences
"""
