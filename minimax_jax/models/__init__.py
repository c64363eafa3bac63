"""MiniMax-M2 in Flax NNX: the model, its cache, generation. The only package here that imports flax."""
