"""From a prompt and inputs to a patch.

transmute   the public function
chats       inputs as later turns of chats
recipe      how: the options, and the paper's
fit         one recipe on one set of encoded examples
"""
