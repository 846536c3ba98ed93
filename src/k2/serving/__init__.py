"""Serving: the chat format, the tool-call parser and the servers."""
