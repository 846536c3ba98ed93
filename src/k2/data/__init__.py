"""Documents, corpus cleaning, tokenizer, packing and the resumable loader."""
