"""Images in: finding, reading and preprocessing photographs, and streaming any kind of images as batches."""
