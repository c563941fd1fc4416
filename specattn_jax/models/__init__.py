"""The decoder of draft and target: shapes, layers, weights, the KV cache, and forward passes."""
