"""One pass of images through a model, for any number of measures: resumable, and shared by several processes."""
