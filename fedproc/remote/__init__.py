"""What a user of the parent process holds: pointers, and the links they talk through."""
