"""What notebooks show: comparisons, sweeps, devices."""
