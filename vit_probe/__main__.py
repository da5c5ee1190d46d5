"""`python -m vit_probe` is `vit-probe`."""

from vit_probe.cli.commands import main

main()
