"""Models and texts: transformers folders, GGUF files, tokenized text."""
