"""Numerical operations: each a readable reference, and faster versions with the same signature."""
