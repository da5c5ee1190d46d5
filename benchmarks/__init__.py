"""The same work done by vit_probe and by its peers, side by side, as ratios to the plain forward pass."""
