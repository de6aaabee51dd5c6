"""What all commands share: options, the names of files, and the process that a command runs in."""
