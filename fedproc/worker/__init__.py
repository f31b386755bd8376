"""What a worker process runs. Imported by nothing on the parent's side."""
