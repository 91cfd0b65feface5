"""Blocks that more than one model uses. Layers know `fathom.ops` and `fathom.mesh`, nothing else."""
