"""Models and texts: transformers folders, GGUF files, and the words of a text."""
