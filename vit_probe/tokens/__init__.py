"""Where a model's tokens lie on the image, and the tokens between its blocks."""
