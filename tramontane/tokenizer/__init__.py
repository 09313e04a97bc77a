"""Text to token ids and back: the tokenizer, its training, and decoding of a stream of ids."""
