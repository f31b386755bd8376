"""Worker processes as a group: start, names, work for all of them, end."""
