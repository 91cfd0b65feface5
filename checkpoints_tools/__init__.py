"""Reading and writing the Hub's checkpoint formats, without PyTorch."""
