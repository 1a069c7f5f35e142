"""What happens between a gradient and the weights: compression, channels, simulated devices."""
