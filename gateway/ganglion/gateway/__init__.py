"""The user's side: an OpenAI-compatible API that holds the text, the templates, the tokenizer and the sessions."""
