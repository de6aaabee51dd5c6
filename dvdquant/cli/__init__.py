"""The commands, of which :mod:`dvdquant.cli.commands` is the table."""
