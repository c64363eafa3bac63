"""Bytes on disk; knows no maths."""
