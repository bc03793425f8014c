"""Choosing the tokens of a text that a model writes about a picture: greedy, beam search, sampling."""
