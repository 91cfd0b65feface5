"""The model zoo: one folder per model, the same file names in each."""
