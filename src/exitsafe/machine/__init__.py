"""What a model runs on: devices, memory and processes."""
