"""Several processes as one: start, agree, keep deadlines, stop and end together."""
