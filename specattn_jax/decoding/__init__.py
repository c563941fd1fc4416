"""Decoding, window by window: states, sampling, strategies, and the loop that runs them."""
