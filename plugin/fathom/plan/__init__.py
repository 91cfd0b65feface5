"""What a step needs before it is run: its operations, counted without a device."""
