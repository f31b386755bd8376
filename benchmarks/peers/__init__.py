"""Other systems doing the same work, each in a process of its own, measured in the same run."""
