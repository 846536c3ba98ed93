"""What a preset takes on a cluster: memory, time, GPU-hours and money, before any of it is spent."""
