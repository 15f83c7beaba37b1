"""Text to token ids: what a model sees with the prompt and without it, before a common e.

examples, example_files   what a user gives, as chats
chat, cuts, places        how a template or a format string writes them, and where the parts meet
instruction               an instruction in an example's chat
prompt                    the two prefixes and e; align shows them
"""
