"""Text in, token windows out: documents, corpora, passkey prompts and repeated segments."""
