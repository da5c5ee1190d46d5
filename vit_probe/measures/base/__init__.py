"""What measures are built on: the decorators that declare one, reduction over tiles, and the registry."""
