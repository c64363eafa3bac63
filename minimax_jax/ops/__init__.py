"""Maths on arrays: pure, jittable, jax only."""
