"""The same work done by vit_probe and by other libraries, as ratios to the plain forward pass."""
