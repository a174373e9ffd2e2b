"""The subcommands of `molex`, one file each; `molex.cli` puts them on the command line."""
